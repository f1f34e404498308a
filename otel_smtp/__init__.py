"""otel_smtp: an SMTP gateway whose every connection is a trace and whose every state transition is an event.

A message's way through the house
---------------------------------
1. `server.listener` accepts a socket, and tells the observers of it before anything is said.
2. `server.connection` feeds its octets to `smtp.server.ServerProtocol`, the engine. The engine answers all that needs
   no decision, and records each state before the reply that goes with it can be seen.
3. MAIL, recipients and content go to a `forwarding.base.Forwarder`. The upstream relay (`forwarding.upstream`) takes a
   kept connection out of its pool and drives it through `smtp.client.ClientProtocol`; what the upstream answers is
   what the client gets.
4. All that happens is told to `observer.Observer`: `telemetry` makes spans, events, metrics and log lines of it,
   `status` shows it, and a `conn_state` callback gets each transition.

`gateway.Gateway` joins the rooms. It and the settings are what programs that embed the gateway need::

    async with Gateway(load(upstream=["smtp://127.0.0.1:1025"]), conn_state=callback) as gateway:
        print(gateway.addresses)
"""

from typing import TYPE_CHECKING, Any

from otel_smtp.observer import ConnectionInfo, Observer
from otel_smtp.smtp.states import ConnState, Transition

if TYPE_CHECKING:
    from otel_smtp.config import Settings, load
    from otel_smtp.gateway import Gateway

__version__ = "0.1.0"
__all__ = ["ConnState", "ConnectionInfo", "Gateway", "Observer", "Settings", "Transition", "load"]


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is first asked for: a command that only needs the version stays quick."""
    match name:
        case "Gateway":
            from otel_smtp.gateway import Gateway

            return Gateway
        case "Settings":
            from otel_smtp.config import Settings

            return Settings
        case "load":
            from otel_smtp.config import load

            return load
        case _:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
