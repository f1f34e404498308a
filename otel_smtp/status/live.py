"""The current connections, for the status page.

Nothing is noted while mail flows: the page is made from the records of the open connections on request. All rendering,
and all redaction, happens then (`LiveView.snapshot`).
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Final

from otel_smtp.observing import ConnectionRecord, Endpoint, Faults, Observer, Outcome, TransactionRecord
from otel_smtp.smtp.states import PULSES, ConnState, Transition

logger: Final = logging.getLogger("otel_smtp.status.live")

# What fits a row of the page; the whole story is in the trace.
PATH_LENGTH: Final = 24
# 256 connections is the default limit; beyond this the page shows the number only.
CONNECTIONS_SHOWN: Final = 500
_NAME_CHARACTERS: Final = 64


class LiveView(Observer):
    """The open connections of this process, and the outcomes of mail so far.

    Args:
        shown_host, shown_name: redact a client's address and its greeting name for the page, None for nothing. Called
            for viewers, never on the mail path.
        clock: monotonic seconds, as the records have them.

    Attributes:
        outcomes: how transactions ended, and how often.
    """

    def __init__(
        self,
        *,
        shown_host: Callable[[str], str | None],
        shown_name: Callable[[str], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.show(shown_host, shown_name)
        self.clock = clock
        self.outcomes: Counter[Outcome] = Counter()
        self._connections: dict[ConnectionRecord, None] = {}
        self._accepted = 0
        self._refused: Counter[str] = Counter()
        self._gone = 0  # changes of connections that are closed, and of none
        self._unix_offset = time.time() - clock()
        self._faults = Faults(logger, "open connection not shown: internal error")

    def show(self, shown_host: Callable[[str], str | None], shown_name: Callable[[str], str | None]) -> None:
        """Change the redaction; see above."""
        self._shown_host = shown_host
        self._shown_name = shown_name

    def connection_opened(self, connection: ConnectionRecord) -> None:
        """It is shown from now on."""
        self._connections[connection] = None
        self._accepted += 1
        self._gone += 1

    def connection_refused(self, reason: str) -> None:
        """Count it."""
        self._refused[reason] += 1
        self._gone += 1

    def connection_closed(self, connection: ConnectionRecord) -> None:
        """It is shown no more."""
        if self._connections.pop(connection, connection) is None:
            self._gone += 1 + _changes(connection)

    def transactions_settled(self, transactions: Sequence[TransactionRecord]) -> None:
        """Count them."""
        self.outcomes.update([each.outcome for each in transactions if each.outcome is not None])

    @property
    def version(self) -> int:
        """Grows with every change, so that a viewer can poll it."""
        return self._gone + sum(map(_changes, self._connections))

    def open_connections(self) -> Iterable[ConnectionRecord]:
        """The connections that are open now, the oldest first."""
        return self._connections.keys()

    def counters(self) -> Mapping[str, Any]:
        """Totals since the start of the process."""
        return {
            "connections_open": len(self._connections),
            "connections_accepted": self._accepted,
            "connections_refused": dict(self._refused),
            "transactions": {str(outcome): count for outcome, count in self.outcomes.items()},
        }

    def snapshot(self) -> list[Mapping[str, Any]]:
        """The open connections, oldest first, at most `CONNECTIONS_SHOWN`.

        Times are points, not ages, so that the same connections give the same answer.
        """
        rows: list[Mapping[str, Any]] = []
        for connection in islice(self._connections, CONNECTIONS_SHOWN):
            try:
                rows.append(self._row(connection))
            except Exception:  # noqa: BLE001 - logged once; the others are shown
                self._faults.note("connection")
        return rows

    def unix_milliseconds(self, moment: float) -> int:
        """A moment of `clock` on the wall clock as it stood when the view was made."""
        return round((moment + self._unix_offset) * 1000)

    def _row(self, connection: ConnectionRecord) -> Mapping[str, Any]:
        info, tls = connection.info, connection.tls
        level, since_ns = _level(connection)
        return {
            "id": info.id,
            "listener": info.listener,
            "protocol": info.protocol,
            "peer": self._peer(connection.client),
            "hello": (self._shown_name(connection.hello_name) or "")[:_NAME_CHARACTERS],
            "state": str(level),
            "opened_unix_milliseconds": self.unix_milliseconds(connection.opened_ns / 1e9),
            "since_unix_milliseconds": self.unix_milliseconds(since_ns / 1e9),
            "tls": None if tls is None else {"version": tls.version, "cipher": tls.cipher},
            "auth": None if connection.user is None else connection.auth_mechanism,
            "messages": connection.messages,
            "errors": connection.errors,
            "path": [
                {
                    "state": str(step.state),
                    "at_unix_milliseconds": self.unix_milliseconds(step.at_ns / 1e9),
                    "code": step.reply_code,
                }
                for step in _path(connection)
            ],
        }

    def _peer(self, client: Endpoint) -> str:
        host = self._shown_host(client.host)
        if host is None:
            return ""
        # A port distinguishes clients behind one address; beside a shortened address it would undo the shortening.
        return str(client) if host == client.host else host


def _changes(connection: ConnectionRecord) -> int:
    """How many transitions it has gone through."""
    last = connection.transitions or connection.earlier
    return last[-1].sequence if last else 0


def _path(connection: ConnectionRecord) -> list[Transition]:
    """The last `PATH_LENGTH` transitions, of whatever segment."""
    recent = connection.transitions[-PATH_LENGTH:]
    before = connection.earlier[len(recent) - PATH_LENGTH :] if len(recent) < PATH_LENGTH else ()
    return [*before, *recent]


def _level(connection: ConnectionRecord) -> tuple[ConnState, int]:
    """Its level, and since when; the pulses Reset and Error appear only in the path."""
    level, since_ns = None, connection.opened_ns
    for step in chain(reversed(connection.transitions), reversed(connection.earlier)):
        if level is None:
            level, since_ns = step.level, step.at_ns
        if step.level is not level:
            break
        if step.state not in PULSES:
            since_ns = step.at_ns
    return level or ConnState.NEW, since_ns
