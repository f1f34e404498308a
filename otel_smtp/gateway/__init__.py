"""The gateway as one thing: wiring, running, processes."""
