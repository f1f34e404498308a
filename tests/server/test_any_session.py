"""A session does what its engine does alone: however octets are cut, whichever answers are late, whichever observers
there are."""

import asyncio
import ipaddress
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from hypothesis import event, given
from hypothesis import strategies as st

from otel_smtp.forwarding.base import MessageAnswered, RecipientsAnswered
from otel_smtp.observing import ConnectionRecord, Observer, Outcome, TransactionRecord
from otel_smtp.server.policy import ListenerPolicy, Segments, ServerTimeouts
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import CloseReason, Transition
from tests.server.keeping import WatchedServer
from tests.support.dialogue import UpstreamScript
from tests.support.engine import Message
from tests.support.fake_stream import FakeStream
from tests.support.scripted_forwarder import ScriptedForwarder, ScriptedTransaction
from tests.test_properties import FLIGHTS, POLICIES, SCRIPT, cuts, run

# Those whose sessions need neither a handshake nor somebody who judges passwords.
HERE: Final = {name: POLICIES[name] for name in ("plain", "LMTP")}


class Seen(Observer):
    """All that a connection's segments held."""

    def __init__(self) -> None:
        self.transitions: list[Transition] = []
        self.replies: list[tuple[str | None, Reply]] = []
        self.transactions: list[TransactionRecord] = []
        self.reason: CloseReason | None = None

    def segment_ended(self, connection: ConnectionRecord) -> None:
        self.transitions += connection.transitions
        self.replies += connection.replies

    def connection_closed(self, connection: ConnectionRecord) -> None:
        self.segment_ended(connection)
        self.reason = connection.end.reason

    def transaction_ended(self, transaction: TransactionRecord) -> None:
        self.transactions.append(transaction)


class Watching(Seen):
    """Asks for each transition too."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Transition] = []

    def conn_state(self, connection: ConnectionRecord, transition: Transition) -> None:
        self.told.append(transition)


class LateForwarder(ScriptedForwarder):
    """Answers, and takes content, at once or when it is told to go on."""

    def __init__(self, script: UpstreamScript, chance: random.Random) -> None:
        super().__init__(script)
        self._chance = chance
        self._waiting: deque[Callable[[], None]] = deque()

    def soon(self, work: Callable[[], None]) -> None:
        """Do it now or later."""
        if self._chance.random() < 0.5:
            work()
        else:
            self._waiting.append(work)

    def holds_back(self, resume: Callable[[], None]) -> bool:
        """Whether content is to wait until `resume`."""
        if self._chance.random() < 0.7:
            return False
        self._waiting.append(resume)
        return True

    def go_on(self) -> None:
        """Do all that waits."""
        while self._waiting:
            self._waiting.popleft()()

    def begin(self, mail: Mail, record: TransactionRecord) -> "_Late":
        super().begin(mail, record)
        return _Late(self, mail)


class _Late(ScriptedTransaction):
    def __init__(self, forwarder: LateForwarder, mail: Mail) -> None:
        super().__init__(forwarder, mail)
        self._late = forwarder
        self._is_over = False

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        self._late.soon(lambda: None if self._is_over else super(_Late, self).recipients(batch, answered))

    def content(self, resume: Callable[[], None]) -> None:
        self._resume = resume

    def write(self, chunk: bytes) -> bool:
        super().write(chunk)
        return not self._late.holds_back(self._resume)

    def finish(self, answered: MessageAnswered) -> None:
        self._late.soon(lambda: None if self._is_over else super(_Late, self).finish(answered))

    def abort(self) -> None:
        self._is_over = True


def without_our_field(message: Message) -> Message:
    """A message as the client sent it."""
    content = message.content
    assert content.startswith(b"Received: ")
    at = content.index(b"\r\n") + 2
    while content[at : at + 1] in (b" ", b"\t") and b"\r\n" in content[at:]:
        end = content.index(b"\r\n", at) + 2
        at = end
        if content[:end].endswith(b"+0000\r\n"):
            break
    return replace(message, content=content[at:])


async def served(policy: str, flights: list[bytes], chance: random.Random, most: int) -> tuple[Seen, list[Message]]:
    """A whole session.

    Args:
        most: transitions of a segment.
    """
    forwarder, stream = LateForwarder(SCRIPT, chance), FakeStream()
    seen = chance.choice([Seen, Watching])()
    server = WatchedServer(forwarder, seen, segments=Segments(transitions=most))
    protocol = replace(HERE[policy], commands_per_turn=chance.choice([1, 2, 100]))
    everyone = (ipaddress.ip_network("0.0.0.0/0"),)
    listener = ListenerPolicy("local", protocol, ServerTimeouts(), allow=everyone, trace_in_reply=False)
    session, ended = server.serve(listener, stream)
    try:
        await stream.sends(b"\r\n")
        for flight in [b"LHLO c.example\r\n" if protocol.is_lmtp else b"EHLO c.example\r\n", *flights]:
            for piece in cuts(flight, chance) if flight else ():
                if chance.random() < 0.2:
                    stream.pause_writing()  # the client reads no replies for a while
                stream.feed(piece)
                for _ in range(chance.choice([0, 0, 1, 3])):
                    await asyncio.sleep(0)
                stream.resume_writing()
                if chance.random() < 0.5:
                    forwarder.go_on()
        stream.feed_eof()
        async with asyncio.timeout(60):
            while not ended.done():
                forwarder.go_on()
                await asyncio.sleep(0)
    finally:
        session.cancel()
        await asyncio.wait([ended])
    if isinstance(seen, Watching):
        assert seen.told == seen.transitions
    return seen, forwarder.messages


def told(one: Transition) -> tuple[object, ...]:
    """A transition but for its time."""
    return one.sequence, one.state, one.previous, one.level, one.detail


def said(one: tuple[str | None, Reply]) -> tuple[object, ...]:
    """A reply, but for how a good one is worded."""
    verb, reply = one
    return (verb, reply.code) if reply.code < 400 else (verb, reply.code, reply.enhanced, reply.lines)


@given(st.sampled_from(sorted(HERE)), FLIGHTS, st.integers(0, 2**32), st.sampled_from([4, 9, 500]))
def test_a_session_does_what_its_engine_does_alone(policy: str, flights: list[bytes], seed: int, most: int) -> None:
    alone = run(HERE[policy], flights, None)
    with asyncio.Runner() as runner:
        seen, messages = runner.run(served(policy, flights, random.Random(seed), most))
    event(f"messages taken: {len(messages)}")
    assert [*map(said, seen.replies)] == [*map(said, alone.replies)]
    assert [*map(told, seen.transitions)] == [*map(told, alone.transitions)]
    assert [*map(without_our_field, messages)] == alone.messages
    accepted = [one for one in seen.transactions if one.outcome in (Outcome.RELAYED, Outcome.PARTLY_RELAYED)]
    assert len(accepted) == len(messages)
