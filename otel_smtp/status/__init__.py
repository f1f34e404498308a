"""The HTTP side: probes, metrics, live connections and recent traces, for people and machines."""
