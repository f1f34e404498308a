"""Observers that note what they are told, in order."""

from otel_smtp.observing import ConnectionInfo, ConnectionObserver, Observer
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import CloseReason, Transition
from tests.support.engine import Record


class RecordingConnection(ConnectionObserver):
    """Notes the states and replies of one connection as a `Record`.

    Attributes:
        record: checked by the test, with `Record.check`, once the connection is over.
        reason: why it ended; None while it lives.
    """

    def __init__(self) -> None:
        self.record = Record()
        self.reason: CloseReason | None = None

    def conn_state(self, transition: Transition) -> None:
        self.record.steps.append(transition)

    def replied(self, verb: str | None, reply: Reply) -> None:
        self.record.steps.append((verb, reply))

    def closed(self, reason: CloseReason, *, octets_received: int, octets_sent: int) -> None:
        assert self.reason is None, "a connection closes once"
        self.reason = reason


class RecordingObserver(Observer):
    """Notes every connection."""

    def __init__(self) -> None:
        self.connections: list[RecordingConnection] = []

    def connection_opened(self, connection: ConnectionInfo) -> ConnectionObserver:
        self.connections.append(RecordingConnection())
        return self.connections[-1]
