"""otel_smtp: an SMTP gateway that makes a trace of every connection and an event of every state transition.

A message's path through the package
------------------------------------
1. `server.listener` accepts a socket, over a stream of `net`.
2. `server.session` feeds its octets to `smtp.server.ServerProtocol`, the engine. The engine answers every command that
   needs no decision, and records each state before the reply that goes with it can be seen.
3. MAIL, recipients and content go to a `forwarding.base.Forwarder`. The upstream relay (`forwarding.upstream`) takes a
   connection from its pool and drives it through `smtp.client.ClientProtocol`; the client gets the upstream's answers.
   In a queue mode, `spool` makes the message durable first, or when the upstream fails for now, and retries until it
   is delivered, or too old and returned to its sender.
4. What happened is noted in records as it happens, and `observing.Observer` receives them: `telemetry` turns them into
   spans, events, metrics and log lines, `status` shows them, and a `conn_state` callback gets each transition.

Where a change is made
----------------------
* What may be said and how it is answered: `smtp`, without input and output. An extension is a row of `smtp.extensions`,
  a reply a line of `smtp.replies`, a connection state a row of `smtp.states`.
* Who may connect, log in, and how long they may take: `server`. Sockets and their deadlines themselves: `net`.
* Which upstream gets a mail, when, over which connection, and what its answers mean: `forwarding`.
* What becomes of a mail that waits: `spool`; how it is kept: `spool.embedded` (a directory), `spool.postgresql` (a
  database); what its sender and its application receive: `spool.dsn`,
  `spool.outcomes`.
* What is noted of all this: `observing`. How OpenTelemetry says it: `telemetry`, with every name in
  `telemetry.attributes`. What the status port shows: `status`.
* A setting: its row in `config.settings`, and `gateway.wiring`, which gives it to the room that uses it. Start, reload,
  workers and shutdown: `gateway`.
* What people type: `commands`. For applications that send mail: `client`; for their tests: `testing`.

Programs that embed the gateway need these two::

    settings = load(upstream=["smtp://127.0.0.1:1025"], listen=["127.0.0.1:0"])
    async with Gateway(settings, conn_state=callback) as gateway:
        print(gateway.addresses)

`load` raises `SettingsError`. `Gateway(...)` raises `CertificateError` or `UsersFileError`
where a file that the settings name is wrong, and its start `CannotListen` or `SpoolError`.
"""

from typing import TYPE_CHECKING, Any

from otel_smtp.observing import ConnectionInfo, Observer
from otel_smtp.smtp.states import ConnState, Transition

if TYPE_CHECKING:
    from otel_smtp.config import Settings, SettingsError, load
    from otel_smtp.gateway import Gateway
    from otel_smtp.net import CannotListen
    from otel_smtp.server.errors import UsersFileError
    from otel_smtp.server.tls import CertificateError
    from otel_smtp.spool.messages import SpoolError

__version__ = "0.1.0"
__all__ = [
    "CannotListen",
    "CertificateError",
    "ConnState",
    "ConnectionInfo",
    "Gateway",
    "Observer",
    "Settings",
    "SettingsError",
    "SpoolError",
    "Transition",
    "UsersFileError",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import heavy modules at first use: commands that need only the version stay quick."""
    match name:
        case "CannotListen":
            from otel_smtp.net import CannotListen

            return CannotListen
        case "CertificateError":
            from otel_smtp.server.tls import CertificateError

            return CertificateError
        case "Gateway":
            from otel_smtp.gateway import Gateway

            return Gateway
        case "Settings":
            from otel_smtp.config import Settings

            return Settings
        case "SettingsError":
            from otel_smtp.config import SettingsError

            return SettingsError
        case "SpoolError":
            from otel_smtp.spool.messages import SpoolError

            return SpoolError
        case "UsersFileError":
            from otel_smtp.server.errors import UsersFileError

            return UsersFileError
        case "load":
            from otel_smtp.config import load

            return load
        case _:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
