"""The command line: one module per command, with the command of the same name in it. `cli` joins them."""
