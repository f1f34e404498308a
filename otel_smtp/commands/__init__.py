"""What people type: one module per command, `cli` joins them."""
