"""What people see in a terminal. Imported by the command line alone, and only by commands that draw."""
