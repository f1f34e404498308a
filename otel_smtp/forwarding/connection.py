"""One connection to an upstream: a stream, a ClientProtocol, and their deadlines.

The one rule that matters: while an exchange is under way the connection is out of step, and only the last awaited
answer brings it back. Any other end of the exchange (a deadline, a mail that gives up, a fault, our own bug) leaves it
out of step, and such a connection is closed and never used again. There is nothing to clean up.

`exchange` begins an exchange, which ends with one callback. The stream pushes arriving octets here, within the
transport's call. `opening` opens connections.
"""

import asyncio
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from otel_smtp.forwarding.faults import ConnectionLost, OutOfStep, TimedOut, UpstreamFault
from otel_smtp.forwarding.settings import (
    DEFAULT_RECIPIENTS,
    PoolLimits,
    ReplyLimits,
    Timeouts,
)
from otel_smtp.forwarding.tickets import Parked
from otel_smtp.net import Stream
from otel_smtp.observing import DeliveryPhase
from otel_smtp.smtp.client import NO_ANSWERS, Answer, Awaited, ClientProtocol, ExchangeAnswers
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import Reply

_NOTHING: Final[AbstractSet[Awaited]] = frozenset()
PART_SECONDS: Final = 2.0
"""How long an upstream may take to end a connection after QUIT."""

Settled = Callable[[ExchangeAnswers, UpstreamFault | None], None]
"""Takes the answers of an exchange, in order, and the fault that ended it before its last answer, if any. It must not
raise.
"""


class UpstreamConnection:
    """A connection after greeting, TLS and authentication.

    Attributes:
        stream, protocol: its parts; commands and content are queued in the protocol.
        is_alive: in step, and neither octets nor its end have arrived since its last answer.
        opening: the steps of its opening, if it was opened before there was a mail and has served none yet; otherwise
            None.
        messages: transactions begun on it; `most_messages`: the most allowed. `most_recipients`: the most in one of
            them.
        opened_at, used_at: by the loop's clock; when it was opened, and released last. `expires_at`: no transaction
            begins on it after this.
        is_spent: no further transaction may begin on it.
        parked: its transaction pauses, and the pool may take the connection away; None: not paused, or no transaction.
        needs_reset: the last transaction was left open: send RSET before the next MAIL, in the same group.
        round_trips: for the current mail, the number of waits for an answer.
        on_lost: called when the connection stops being alive between two exchanges.
    """

    __slots__ = (
        "_answers",
        "_asked_at",
        "_loop",
        "_on_settled",
        "_on_writable",
        "_patience_seconds",
        "_stop_at",
        "_timeouts",
        "expires_at",
        "is_alive",
        "is_spent",
        "messages",
        "most_messages",
        "most_recipients",
        "needs_reset",
        "on_lost",
        "opened_at",
        "opening",
        "parked",
        "protocol",
        "round_trips",
        "stream",
        "used_at",
    )

    def __init__(
        self,
        stream: Stream,
        timeouts: Timeouts,
        *,
        is_lmtp: bool = False,
        limits: PoolLimits = PoolLimits(),  # noqa: B008 - frozen
        reply_limits: ReplyLimits = ReplyLimits(),  # noqa: B008 - frozen
        disabled: Collection[str] = (),
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.stream = stream
        self.protocol = ClientProtocol(
            is_lmtp=is_lmtp,
            max_reply_line_octets=reply_limits.line_octets,
            max_reply_lines=reply_limits.lines,
            disabled=disabled,
        )
        self.is_alive = self.is_spent = False
        self.parked: Parked | None = None
        self.messages = 0
        self.opening: Sequence[tuple[DeliveryPhase, Reply | None]] | None = None
        self.most_recipients = DEFAULT_RECIPIENTS
        self.opened_at = self.used_at = self._loop.time()
        self.most_messages = limits.messages
        self.expires_at = self.opened_at + limits.age_seconds
        self.needs_reset = False
        self.round_trips = 0
        self.on_lost: Callable[[UpstreamConnection], None] | None = None
        self._timeouts = timeouts
        self._patience_seconds = _patience_seconds(timeouts)
        self._answers: list[Answer] = []  # of the current exchange, while more are to come
        self._asked_at = 0.0  # when the current wait began
        self._on_settled: Settled | None = None  # None: no exchange is under way
        self._stop_at: AbstractSet[Awaited] | None = _NOTHING  # None: see `_is_in_content`
        self._on_writable: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<UpstreamConnection {self.stream!r} {self.messages} messages>"

    @property
    def extensions(self) -> Extensions:
        """The upstream's extensions on this connection."""
        return self.protocol.extensions

    @property
    def idle_seconds(self) -> float:
        """Time since it was last released, or opened."""
        return self._loop.time() - self.used_at

    def ensure_alive(self) -> None:
        """Check before an exchange begins: commands sent over a dead connection would have an unknown outcome.

        Raises:
            ConnectionLost: the upstream is gone, or has said 421.
            OutOfStep: it has said something else.
        """
        if self.is_alive:
            return
        farewell: Sequence[Answer] = self._answers or self.protocol.receive(b"")
        if self.protocol.fault is not None:
            raise OutOfStep(str(self.protocol.fault)) from self.protocol.fault
        if farewell:
            raise ConnectionLost("the upstream closed the connection with 421", upstream_reply=farewell[-1].reply)
        raise ConnectionLost("connection lost between two exchanges")

    # Exchanges --------------------------------------------------------------------------------------------

    def exchange(self, on_settled: Settled, *, stop_at: AbstractSet[Awaited] = _NOTHING) -> None:
        """Send the queued commands, and call `on_settled` when all are answered; each answer has its own deadline.

        The fault is ConnectionLost if the upstream left, was silent for too long (then TimedOut) or said 421; OutOfStep
        if it broke the protocol. Earlier answers count.

        Args:
            stop_at: verbs whose refusal makes unsent commands pointless; these are then taken back.
        """
        self.is_alive = False
        self._on_settled = on_settled
        self._stop_at = stop_at
        protocol, stream = self.protocol, self.stream
        if data := protocol.data_to_send():
            self.round_trips += 1
            stream.write(data)
        self._asked_at = self._loop.time()
        if stream.is_eof and stream.receiver is self:
            self._end(self._lost())

    def send_content(self, on_settled: Settled, on_writable: Callable[[], None]) -> bool:
        """Send a queued piece of content other than the last, which `exchange` sends.

        Meanwhile the upstream may refuse the content, or leave: then `on_settled` is called, as for an exchange, and
        `on_writable` no more.

        Returns:
            Whether more can be sent at once. If not, `on_writable` is called when it can.
        """
        self.is_alive = False
        self._on_settled = on_settled
        self._stop_at = None
        self.stream.write(self.protocol.data_to_send())
        if self.stream.is_eof:
            self._end(self._lost())
            return False
        if not self.stream.is_write_paused:
            return True
        self._on_writable = on_writable
        self._asked_at = self._loop.time()
        return False

    async def settled(self) -> list[Answer]:
        """`exchange` as a coroutine; the first one starts reading the stream.

        Raises:
            UpstreamFault: as for `exchange`.
        """
        waiting: asyncio.Future[UpstreamFault | None] = self._loop.create_future()
        got: list[Answer] = []

        def on_settled(answers: ExchangeAnswers, fault: UpstreamFault | None) -> None:
            got.extend(answers)
            if not waiting.done():
                waiting.set_result(fault)

        if self.stream.receiver is self:
            self.ensure_alive()
        self.exchange(on_settled)
        if self.stream.receiver is None:
            self.stream.receive_by(self)
        try:
            if not waiting.done():
                async with asyncio.timeout_at(self.deadline):
                    await waiting
        except TimeoutError as error:
            raise self._late() from error
        finally:
            self.abandon()
        if (fault := waiting.result()) is not None:
            raise fault
        return got

    @property
    def deadline(self) -> float:
        """When the current exchange fails, by the loop's clock; infinity: there is none, or it is our turn."""
        if self._on_settled is None:
            return math.inf
        if self._is_in_content:
            return math.inf if self._on_writable is None else self._asked_at + self._timeouts.block
        return self._asked_at + self._patience_seconds[self._awaited]

    def check_deadline(self, now: float) -> None:
        """End an exchange that takes too long; call it a few times per second while one may be under way."""
        if self._on_settled is not None and now >= self.deadline:
            self._end(self._late())

    def _late(self) -> TimedOut:
        if self._is_in_content:
            return TimedOut(f"the upstream took no more content within {self._timeouts.block:g} s")
        verb = self._awaited
        seconds = self._patience_seconds[verb]
        return TimedOut(f"no {_answer_to(verb)} within {seconds:g} s")

    def _lost(self) -> ConnectionLost:
        if self._is_in_content:
            return ConnectionLost("connection lost within the content")
        return ConnectionLost(f"connection lost before the {_answer_to(self._awaited)}")

    @property
    def _is_in_content(self) -> bool:
        """Whether the end of the content has not been sent yet, so that any answer ends the exchange."""
        return self._stop_at is None

    @property
    def _awaited(self) -> Awaited | None:
        return self.protocol.awaited[0] if self.protocol.awaited else None

    def abandon(self) -> None:
        """Drop the result of the current exchange; the connection stays out of step."""
        self._on_settled = self._on_writable = None

    def close(self) -> None:
        """End it: QUIT without waiting for the answer if it is in step, otherwise at once. Idempotent."""
        self.on_lost = None
        if not self.is_alive:
            self.stream.abort()
            return
        # RFC 5321 4.1.1.10 tells a client to wait for the reply; that gains nothing.
        self.is_alive = False
        self.protocol.send_quit()
        self._flush()
        self.stream.close()

    def part(self, gone: Callable[[bool], None]) -> None:
        """End it by QUIT, and report when the upstream has ended it too (RFC 5321 4.1.1.10).

        Args:
            gone: called with whether the upstream is known to have noticed.
        """
        stream, was_alive = self.stream, self.is_alive
        if stream.is_eof or not was_alive:
            has_noticed = stream.is_eof
            self.close()
            self._loop.call_soon(gone, has_noticed)
            return
        self.on_lost = None
        self.is_alive = False

        def over(has_noticed: bool) -> None:
            stream.on_lost = None
            late.cancel()
            stream.close() if has_noticed else stream.abort()
            gone(has_noticed)

        late = self._loop.call_later(PART_SECONDS, over, False)
        stream.on_lost = lambda: over(True)
        self.protocol.send_quit()
        self._flush()

    def _flush(self) -> None:
        """Write everything that may be sent now, in one piece."""
        if data := self.protocol.data_to_send():
            self.round_trips += 1
            self.stream.write(data)

    def _end(self, fault: UpstreamFault | None) -> None:
        """The exchange is over."""
        on_settled = self._on_settled
        assert on_settled is not None
        answers, self._answers = self._answers, []
        self._on_settled = self._on_writable = None
        self.is_alive = fault is None and self.protocol.is_in_step
        on_settled(ExchangeAnswers(answers) if answers else NO_ANSWERS, fault)

    # Receiver ---------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Match arriving replies with commands."""
        protocol = self.protocol
        answers = protocol.receive(data)
        on_settled = self._on_settled
        if protocol.is_in_step and on_settled is not None:
            # The same as `_end`, inlined: all is answered, and the connection stays open. Every mail takes this path.
            if self._answers:
                answers = ExchangeAnswers((*self._answers, *answers))
                self._answers = []
            self._on_settled = None
            self.is_alive = True
            on_settled(answers, None)
            return
        self._answers += answers
        if on_settled is None:
            self._be_lost()
            return
        for verb, reply in answers:
            if reply.code == 421:
                self._end(ConnectionLost("the upstream closed the connection with 421", upstream_reply=reply))
                return
            if reply.code >= 400 and self._stop_at is not None and verb in self._stop_at:
                protocol.cancel_queued()
        if protocol.fault is not None:
            fault = OutOfStep(str(protocol.fault), protocol.fault.said)
            fault.__cause__ = protocol.fault
            self._end(fault)
        elif answers:
            # Before the end of the content the engine accepts only a refusal of it.
            if not (protocol.awaited or protocol.queued) or self._is_in_content:
                self._end(None)
                return
            if protocol.queued:
                self._flush()
            self._asked_at = self._loop.time()

    def input_ended(self) -> None:
        """The upstream is gone."""
        if self._on_settled is not None:
            self._end(self._lost())
        else:
            self._be_lost()

    def writing_resumed(self) -> None:
        """The upstream takes more content."""
        on_writable, self._on_writable = self._on_writable, None
        if on_writable is not None:
            on_writable()

    def _be_lost(self) -> None:
        self.is_alive = False
        if self.on_lost is not None:
            self.on_lost(self)


@lru_cache(maxsize=64)
def _patience_seconds(timeouts: Timeouts) -> Mapping[Awaited | None, float]:
    """How long the awaited answer may take."""
    patience: dict[Awaited | None, float] = {
        **dict.fromkeys((*Awaited, None), timeouts.command),
        Awaited.GREETING: timeouts.greeting,
        Awaited.DATA: timeouts.data,
        Awaited.CONTENT: timeouts.reply,
    }
    return MappingProxyType(patience)


def _answer_to(verb: Awaited | None) -> str:
    match verb:
        case None:
            return "reply"
        case Awaited.GREETING:
            return "greeting"
        case Awaited.CONTENT:
            return "reply to the end of DATA"  # BDAT LAST as well
        case _:
            return f"reply to {verb}"
