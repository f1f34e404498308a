"""What people type: one module per command, and in it the command by the same name. `cli` joins them."""
