"""An observer that makes a `Record` of each connection, as the engine's driver does."""

from collections.abc import Iterator, Sequence

from otel_smtp.observing import ConnectionRecord, Observer
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import CloseReason, ConnState, Transition
from tests.support.engine import Record

Said = tuple[str | None, Reply]


class RecordingObserver(Observer):
    """Notes every connection that is over.

    Attributes:
        records: to be checked by the test, with `Record.check`; `reasons`: why each ended.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.reasons: list[CloseReason | None] = []

    def connection_closed(self, connection: ConnectionRecord) -> None:
        self.records.append(Record(list(in_order(connection.transitions, connection.replies))))
        self.reasons.append(connection.end.reason)


def in_order(transitions: Sequence[Transition], said: Sequence[Said]) -> Iterator[Transition | Said]:
    """Transitions and replies in one order: each reply that reveals a state stands right behind it, which leaves no
    doubt where the two lists are in step, and fails `Record.check` where they are not."""
    left = list(transitions)
    for verb, reply in said:
        place = next((place for place, each in enumerate(left) if _is_revealed(each, reply)), None)
        if place is not None:
            yield from left[: place + 1]
            del left[: place + 1]
        yield verb, reply
    yield from left


def _is_revealed(transition: Transition, reply: Reply) -> bool:
    if reply.code >= 400:
        return transition.reply is reply
    if reply.code == 354:
        return transition.state is ConnState.DATA
    return reply.code == 235 and transition.state is ConnState.ACTIVE and transition.mechanism is not None
