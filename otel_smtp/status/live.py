"""The connections of this moment, as the status page shows them.

A handle here costs the mail path a few attribute writes and one append a transition: no copy, no lock, no call to
whoever looks. All rendering, and all redaction, happens when somebody asks (`LiveView.snapshot`).
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Final

from otel_smtp.observing import (
    ConnectionInfo,
    ConnectionObserver,
    Endpoint,
    Observer,
    Outcome,
    TlsInfo,
    TransactionObserver,
)
from otel_smtp.smtp.envelope import Mail
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.states import CloseReason, ConnState, Transition

# What fits a row of the page; the whole story is in the trace.
PATH_LENGTH: Final = 24
# 256 connections is the default limit; beyond this the page tells the number only.
CONNECTIONS_SHOWN: Final = 500
_NAME_CHARACTERS: Final = 64

Step = tuple[float, ConnState, int | None]
"""When (monotonic seconds), the state, and the reply code of an Error."""


class _Outcomes(TransactionObserver):
    """Counts how transactions ended; one object serves all of them, since it knows nothing of any."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts: Counter[Outcome] = Counter()

    def ended(self, outcome: Outcome, reply: Reply | None, *, error_type: ErrorType | None = None) -> None:
        self.counts[outcome] += 1


class LiveConnection(ConnectionObserver):
    """One open connection: the last of everything that it told.

    Attributes:
        client: the peer, or the client that a believed PROXY header named.
        opened, since: monotonic seconds of the accept, and of the entry into the present level.
        level: the state at which it is; the pulses Reset and Error show in `path` alone.
        path: the last `PATH_LENGTH` transitions.
    """

    __slots__ = (
        "_view", "client", "errors", "hello_name", "info", "level", "mechanism", "messages", "opened", "path", "since",
        "tls",
    )  # fmt: skip

    def __init__(self, view: "LiveView", info: ConnectionInfo) -> None:
        self._view = view
        self.info = info
        self.client = info.peer
        self.opened = self.since = view.clock()
        self.level = ConnState.NEW
        self.path: deque[Step] = deque(maxlen=PATH_LENGTH)
        self.messages = 0
        self.errors = 0
        self.tls: TlsInfo | None = None
        self.hello_name = ""
        self.mechanism: str | None = None

    def conn_state(self, transition: Transition) -> None:
        view = self._view
        now = view.clock()
        if transition.level is not self.level:
            self.level = transition.level
            self.since = now
        if transition.state is ConnState.ERROR:
            self.errors += 1
        if transition.messages is not None:
            self.messages = transition.messages
        self.path.append((now, transition.state, transition.reply_code))
        view.version += 1

    def proxied(self, client: Endpoint, server: Endpoint) -> None:
        self.client = client

    def hello(self, verb: str, name: str) -> None:
        self.hello_name = name

    def tls_established(self, tls: TlsInfo) -> None:
        self.tls = tls

    def authenticated(self, user: str, mechanism: str) -> None:
        self.mechanism = mechanism

    def transaction_begun(self, mail: Mail, number: int) -> TransactionObserver:
        return self._view.outcomes

    def closed(self, reason: CloseReason, *, octets_received: int, octets_sent: int) -> None:
        self._view.forget(self)


class LiveView(Observer):
    """The open connections of this process and what became of the mail so far.

    Args:
        shown_host, shown_name: what may be shown of a client's address and of the name that it gives itself (the
            operator's redaction), None for nothing. Called for who looks, never on the mail path.
        clock: monotonic seconds.

    Attributes:
        version: grows with every change; whoever shows the view compares it instead of being called.
    """

    def __init__(
        self,
        *,
        shown_host: Callable[[str], str | None],
        shown_name: Callable[[str], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shown_host = shown_host
        self._shown_name = shown_name
        self.clock = clock
        self.version = 0
        self.outcomes = _Outcomes()
        self._connections: dict[str, LiveConnection] = {}
        self._accepted = 0
        self._refused: Counter[str] = Counter()
        self._unix_offset = time.time() - clock()

    def connection_opened(self, connection: ConnectionInfo) -> ConnectionObserver:
        live = LiveConnection(self, connection)
        self._connections[connection.id] = live
        self._accepted += 1
        self.version += 1
        return live

    def connection_refused(self, reason: str) -> None:
        self._refused[reason] += 1
        self.version += 1

    def forget(self, connection: LiveConnection) -> None:
        """The connection is closed."""
        self._connections.pop(connection.info.id, None)
        self.version += 1

    def counters(self) -> Mapping[str, Any]:
        """Totals since the start of the process."""
        return {
            "connections_open": len(self._connections),
            "connections_accepted": self._accepted,
            "connections_refused": dict(self._refused),
            "transactions": {str(outcome): count for outcome, count in self.outcomes.counts.items()},
        }

    def snapshot(self) -> list[Mapping[str, Any]]:
        """The open connections, oldest first, at most `CONNECTIONS_SHOWN`.

        Times are points, not ages, so that the same connections give the same answer.
        """
        return [self._row(connection) for connection in islice(self._connections.values(), CONNECTIONS_SHOWN)]

    def unix_milliseconds(self, moment: float) -> int:
        """A moment of `clock` on the wall clock as it stood when the view was made."""
        return round((moment + self._unix_offset) * 1000)

    def _row(self, connection: LiveConnection) -> Mapping[str, Any]:
        info, tls = connection.info, connection.tls
        return {
            "id": info.id,
            "listener": info.listener,
            "protocol": info.protocol,
            "peer": self._peer(connection.client),
            "hello": (self._shown_name(connection.hello_name) or "")[:_NAME_CHARACTERS],
            "state": str(connection.level),
            "opened_unix_milliseconds": self.unix_milliseconds(connection.opened),
            "since_unix_milliseconds": self.unix_milliseconds(connection.since),
            "tls": None if tls is None else {"version": tls.version, "cipher": tls.cipher},
            "auth": connection.mechanism,
            "messages": connection.messages,
            "errors": connection.errors,
            "path": [
                {"state": str(state), "at_unix_milliseconds": self.unix_milliseconds(at), "code": code}
                for at, state, code in connection.path
            ],
        }

    def _peer(self, client: Endpoint) -> str:
        host = self._shown_host(client.host)
        if host is None:
            return ""
        # A port tells clients behind one address apart; beside a shortened address it would undo the shortening.
        return str(client) if host == client.host else host
