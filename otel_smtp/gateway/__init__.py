"""The gateway as one thing: `Gateway`, wiring, ports, processes, signals."""

from otel_smtp.gateway.gateway import Gateway

__all__ = ["Gateway"]
