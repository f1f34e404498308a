"""SMTP as a pure value machine: octets in, events and octets out.

Nothing in this package knows a clock, a socket, a logger, a thread or ``await``. So every rule of the protocol can be
tested on plain bytes: whole, octet by octet, and cut anywhere.
"""
