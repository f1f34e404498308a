"""The listening side: sockets, one connection, deadlines, TLS, users, PROXY headers."""
