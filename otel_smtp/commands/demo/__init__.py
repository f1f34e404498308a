"""The demonstration: a gateway between clients that misbehave on purpose and an upstream that keeps what arrives."""
