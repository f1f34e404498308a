"""The gateway as one thing: `Gateway`, wiring, ports, processes, signals."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otel_smtp.gateway.gateway import Gateway

__all__ = ["Gateway"]


def __getattr__(name: str) -> Any:
    """Import the whole gateway at first use: `signals` is needed before that, which takes time."""
    if name != "Gateway":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from otel_smtp.gateway.gateway import Gateway

    return Gateway
