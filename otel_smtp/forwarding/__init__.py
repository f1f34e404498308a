"""Accepted mail leaves here: the upstream relay with its pool, routes and strategies, behind one interface."""
