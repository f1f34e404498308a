"""The upstream relay, by which accepted mail leaves: pool, routes and strategies behind one interface."""
