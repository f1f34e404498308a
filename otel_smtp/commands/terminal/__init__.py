"""Drawing in a terminal. Only commands that draw import it."""
