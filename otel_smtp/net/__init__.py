"""The network: streams over asyncio's or uvloop's transports, connecting, listening, and the deadline sweep."""

from otel_smtp.net.ciphers import TLS_1_2_SUITES, require_modern_tls
from otel_smtp.net.connecting import connect, connect_unix
from otel_smtp.net.listening import (
    CannotListen,
    Listener,
    is_accept_exhausted,
    listen,
    refuse_served,
    remove_unix_path,
    stop_listening,
)
from otel_smtp.net.neighbours import owner_of_peer
from otel_smtp.net.stream import CLOCK_SLACK_SECONDS, Receiver, Stream
from otel_smtp.net.sweep import Sweep

__all__ = [
    "CLOCK_SLACK_SECONDS",
    "TLS_1_2_SUITES",
    "CannotListen",
    "Listener",
    "Receiver",
    "Stream",
    "Sweep",
    "connect",
    "connect_unix",
    "is_accept_exhausted",
    "listen",
    "owner_of_peer",
    "refuse_served",
    "remove_unix_path",
    "require_modern_tls",
    "stop_listening",
]
