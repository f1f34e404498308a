"""otel_smtp: an SMTP gateway that makes a trace of every connection and an event of every state transition.

A message's path through the package
------------------------------------
1. `server.listener` accepts a socket, as a stream of `net`.
2. `server.session` feeds its octets to `smtp.server.ServerProtocol`, the engine. The engine answers every command that
   needs no decision, and records each state before its reply can be seen.
3. MAIL, recipients and content go to a `forwarding.base.Forwarder`. The upstream relay (`forwarding.upstream`) takes a
   connection from its pool and drives it through `smtp.client.ClientProtocol`; the client gets the upstream's answers.
   In a queue mode, `spool` makes the message durable, at once or after a temporary failure of the upstream, and retries
   until it is delivered, or expires and is returned to its sender.
4. Records collect the facts, and each `observing.Observer` receives finished records: `telemetry` makes spans, events,
   metrics and log lines from them, `status` shows them, and a `conn_state` callback gets each transition.

Where to change something
-------------------------
* Commands and their replies: `smtp`, without input and output. An extension is a row of `smtp.extensions`, a reply a
  line of `smtp.replies`, a connection state a row of `smtp.states`.
* Access, AUTH, TLS and time limits of clients: `server`. Sockets, and the sweep of deadlines: `net`.
* Choosing an upstream, connections to it, and the meaning of its answers: `forwarding`.
* Queued mail, its retries and expiry: `spool`; storing it: `spool.embedded` (a directory), `spool.postgresql` (a
  database); notices to senders: `spool.dsn`; reports to the application: `spool.outcomes`.
* Records, and the hooks of observers: `observing`. OpenTelemetry: `telemetry`, with every name in
  `telemetry.attributes`. The status port: `status`.
* A setting: its row in `config.settings`, and `gateway.wiring`, which passes it to the package that uses it. Start,
  reload, workers and shutdown: `gateway`.
* The command line: `commands`. For applications that send mail: `client`; for their tests: `testing`.

Programs that embed the gateway need these two names::

    settings = load(upstream=["smtp://127.0.0.1:1025"], listen=["127.0.0.1:0"])
    async with Gateway(settings, conn_state=callback) as gateway:
        print(gateway.addresses)

`load` raises `SettingsError`. `Gateway(...)` raises `CertificateError` or `UsersFileError` if a file that the settings
name is wrong, and its start `CannotListen` or `SpoolError`.
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
