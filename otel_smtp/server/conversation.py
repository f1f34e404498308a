"""The turns of a session: input, the engine's work, output, and the deadlines."""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from time import monotonic_ns
from typing import Any, Final

from otel_smtp.forwarding.base import MailTransaction
from otel_smtp.net import CLOCK_SLACK_SECONDS, Stream, owner_of_peer
from otel_smtp.observing import ConnectionEnd, ConnectionRecord, TransactionRecord, trace_fields
from otel_smtp.server.exchanges import Exchange
from otel_smtp.server.failure_rate import network_of
from otel_smtp.server.places import Standing
from otel_smtp.server.policy import House, ListenerPolicy
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.smtp.handler import Asked
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.sequence import Phase
from otel_smtp.smtp.server import ServerProtocol
from otel_smtp.smtp.states import CloseReason

logger: Final = logging.getLogger("otel_smtp.server.session")

# For a client that reads none of our replies: RFC 5321 4.5.3.2.5 allows three minutes per block of octets.
UNREAD_REPLIES_SECONDS: Final = 180.0
# We end the session while the client may be in the middle of sending, so it gets time to read why. Not at a shutdown,
# which has one grace period for all, nor if the client has ended the session or speaks another protocol.
_GENTLE_ENDS: Final = frozenset(
    {CloseReason.TIMEOUT, CloseReason.TOO_MANY_ERRORS, CloseReason.REFUSED, CloseReason.INTERNAL_ERROR}
)
_ELSEWHERE: Final = "elsewhere "  # the prefix of the shares of clients on other machines
REPLIES_TO_CONTENT: Final = 3  # phases that are no news: after the last recipient, DATA, the content
# A segment is cut between transactions. Once it has grown to this multiple of its size it is cut anywhere, so that a
# client cannot make it grow without end within one transaction. Replies count likewise: those to a thousand recipients,
# or to many chunks, come without transitions.
_HARD_SEGMENTS: Final = 4


@dataclass(slots=True)
class Login:
    """One AUTH command.

    Attributes:
        claimed: the name that the client claims.
        awaits_turn: it is to be verified, and others are before it.
    """

    exchange: Exchange
    claimed: str = ""
    awaits_turn: bool = False


def internal_error() -> str:
    """The current exception, a bug of ours, as a reason for a failure: only its class, as its text may quote a peer."""
    error = sys.exception()
    return "internal error" if error is None else f"internal error: {type(error).__name__}"


class Pause(IntEnum):
    """Reasons to stop reading."""

    CONTENT = 1  # the forwarder holds it back
    DECISION = 2  # a decision is awaited, and more has arrived
    UNREAD = 4  # the client does not read its replies
    TURN = 8  # other connections come first
    TLS = 16  # further octets belong to the TLS layer


class Conversation:
    """A stream and an engine that take turns; see `Session` for its arguments and attributes."""

    __slots__ = (
        "_allows",
        "_auth",
        "_batch",
        "_began",
        "_content_began",
        "_content_octets",
        "_failed_content",
        "_forwarded",
        "_has_ended",
        "_held_back_at",
        "_house",
        "_is_busy",
        "_is_served",
        "_loop",
        "_pauses",
        "_policy",
        "_protocol",
        "_received_head",
        "_request_octets",
        "_session_ends",
        "_stream",
        "_task",
        "_told",
        "_trace_id",
        "_transaction",
        "client_counted",
        "record",
        "share",
    )

    def __init__(
        self,
        stream: Stream,
        record: ConnectionRecord,
        policy: ListenerPolicy,
        house: House,
        protocol: ServerProtocol,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self.record = record
        self._policy = policy
        self._house = house
        self._protocol = protocol
        self._protocol.now_ns = record.opened_ns
        self.client_counted: str | None = None
        self.share = ""  # its owner, for `Places`; None until looked up
        self._forwarded: MailTransaction | None = None
        self._transaction: TransactionRecord | None = None
        self._trace_id: str | None = None  # of the current message
        self._failed_content: Reply | None = None  # the forwarder has failed while the client was still sending
        self._batch: Sequence[Recipient] = ()
        self._auth: Login | None = None  # until it is judged
        self._task: asyncio.Task[None] | None = None  # rare work, done in a coroutine
        self._allows: bool | None = None  # whether this client may relay without AUTH; None: not looked up yet
        self._received_head: bytes | None = None  # of this session's Received fields, except for SMTPUTF8 messages
        self._pauses = 0
        self._began = self._loop.time()  # when the current request began
        self._request_octets = 0  # received before it
        self._content_began = 0.0  # when the current message's content began
        self._content_octets = 0  # received before it
        self._held_back_at = 0.0  # when the forwarder stopped the content
        self._session_ends: float | None = None
        self._told = 0  # transitions of the current segment that `conn_state` observers have been given
        self._is_busy = False  # a call from outside is under way, see `_step`; or there will be none any more
        self._is_served = False  # not for connections refused at accept: a flood of them must not hold sockets
        self._has_ended = False

    # Reports from the stream -------------------------------------------------------------------------------------

    def input_ended(self) -> None:
        """See `Receiver`."""
        self._call(self._end_input)

    def _end_input(self) -> None:
        if self._protocol.phase is Phase.UNGREETED:
            self._protocol.greet()
        if self._auth is not None and self._auth.awaits_turn:
            # It will read no answer, and others wait behind it.
            self._protocol.fail(None, CloseReason.CLIENT_DISCONNECT)
        else:
            self._protocol.receive_eof()

    def writing_resumed(self) -> None:
        """See `Receiver`."""
        self._resume(Pause.UNREAD)
        self._house.wait_turn(self)

    def _call(self, work: Callable[..., None], *arguments: Any) -> None:
        """`_step` for work with any number of arguments."""
        self._protocol.now_ns = monotonic_ns()
        self._step(None, lambda _: work(*arguments))

    def _step(self, data: Any, work: Callable[[Any], None] | None = None) -> None:
        """Do `work`, called from outside; then notify observers, write the replies, and close what has ended. A bug of
        ours ends the session, and nothing else.

        Most steps are part of ordinary mail and have no news: only the replies remain to be written.

        Args:
            data: the argument for `work`.
            work: None: take octets from the client, as most steps do; see `Receiver.data_received`. This sets the
                engine's time; for all other work the caller has set it.
        """
        protocol = self._protocol
        if self._is_busy:
            if not self._has_ended:
                (work or protocol.receive_data)(data)  # within such a call
            return
        self._is_busy = True
        try:
            if work is None:
                protocol.now_ns = monotonic_ns()
                protocol.receive_data(data)
            else:
                work(data)
        except Exception:  # noqa: BLE001 - logged there
            self._log_failure()
            protocol.fail(replies.INTERNAL_CLOSING, CloseReason.INTERNAL_ERROR)
        self._is_busy = False
        has_news = protocol.has_news
        if has_news:
            self._tell_news()
        if out := protocol.out:
            protocol.out = b""
            stream = self._stream
            self._began = self._loop.time()
            self._request_octets = stream.octets_received
            stream.write(out)
            if stream.is_write_paused:
                has_news = True
        if has_news:
            self._act_on_news()

    data_received = _step

    def _log_failure(self) -> None:
        """Log the current exception, a bug of ours. The client gets its answer even if logging fails."""
        self.record.failure = internal_error()
        with contextlib.suppress(Exception):
            logger.exception("session failed", extra=self._named())

    def _named(self) -> dict[str, object]:
        """The log fields that name the connection and its span."""
        record = self.record
        return {"connection_id": record.id, **trace_fields(self._house.observer.connection_carrier(record))}

    def _tell_news(self) -> None:
        """The part before anything is written: ends, and notifying observers."""
        protocol, house, record = self._protocol, self._house, self.record
        is_watched = house.observer.wants_transitions
        # Every step has news while a `conn_state` observer listens, while an answer may let the client continue, and
        # while a full segment waits for the end of its transaction.
        protocol.has_news = bool(
            is_watched
            or house.is_draining
            or self._pauses
            or len(record.replies) >= house.segments.transitions - REPLIES_TO_CONTENT
        )
        if house.is_draining and not protocol.is_in_transaction:
            protocol.fail(replies.SHUTTING_DOWN, CloseReason.SHUTDOWN)
        record.errors = protocol.errors
        record.messages = protocol.messages
        if is_watched:
            self._tell_transitions()

    def _act_on_news(self) -> None:
        """The part after all is written: reading, closing, cutting the record."""
        protocol, record = self._protocol, self.record
        if self._stream.is_write_paused:
            self._pause(Pause.UNREAD)
        if protocol.close_reason is not None:
            self._finish(protocol.close_reason)
            return
        if protocol.received.held or self._pauses:
            self._manage_reading()
        most = self._house.segments.transitions
        if len(record.transitions) >= most or len(record.replies) >= _HARD_SEGMENTS * most:
            self._end_full_segment(most)

    def _manage_reading(self) -> None:
        """Stop reading while held octets cannot run, so that more wait in the kernel."""
        protocol = self._protocol
        if protocol.asked is Asked.NOTHING:
            self._resume(Pause.DECISION)
        elif protocol.received.held:
            self._pause(Pause.DECISION)
        if protocol.wants_turn and not self._pauses & Pause.TURN:
            self._pause(Pause.TURN)
            self._house.wait_turn(self)

    def take_turn(self) -> bool:
        """Run some of the commands that waited for other connections; False if nothing can be done now, since the
        client does not read its replies or has gone.
        """
        if self._pauses & Pause.UNREAD or self._has_ended:
            return False
        self._resume(Pause.TURN)
        self._call(self._protocol.run)
        return True

    def _pause(self, why: Pause) -> None:
        if not self._pauses:
            self._stream.pause_reading()
        self._pauses |= why
        self._protocol.has_news = True  # again in each step, until it resumes

    def _resume(self, why: Pause) -> None:
        if self._pauses:
            self._pauses &= ~why
            if not self._pauses:
                self._stream.resume_reading()

    def _tell_transitions(self) -> None:
        transitions = self.record.transitions
        while self._told < len(transitions):
            self._told += 1
            self._house.observer.conn_state(self.record, transitions[self._told - 1])

    # A place among all connections -------------------------------------------------------------------------------

    def learn_share(self, *, is_local: bool) -> None:
        """Look up the connection's share; see `Places`."""
        host = self.record.client.host
        owner = owner_of_peer(self._stream) if is_local else _ELSEWHERE + network_of(host)
        self.share = _one_of_share(owner or f"address {host}")

    @property
    def is_local(self) -> bool:
        """See `PlaceHolder`."""
        return bool(self.share) and not self.share.startswith(_ELSEWHERE)

    @property
    def standing(self) -> Standing:
        """See `PlaceHolder`."""
        protocol = self._protocol
        if self._has_ended or protocol.asked in (Asked.TLS, Asked.AUTH):
            return Standing.IDLE  # a client that guesses passwords waits for us, but may lose its place
        if protocol.asked is not Asked.NOTHING:
            return Standing.OURS
        if protocol.awaits_content or protocol.has_open_content:
            return Standing.CONTENT
        return Standing.OPEN if protocol.is_in_transaction else Standing.IDLE

    @property
    def has_moved_mail(self) -> bool:
        """See `PlaceHolder`."""
        return self._protocol.messages > 0

    def idle_seconds(self, now: float) -> float:
        """See `PlaceHolder`."""
        return now - self._began

    def age_seconds(self, now: float) -> float:
        """See `PlaceHolder`."""
        return now - self.record.opened_ns / 1e9

    def wait_in_line(self) -> None:
        """It is not served yet: the client's octets stay in the kernel."""
        self._stream.pause_reading()

    def leave_line(self) -> None:
        """Leave the waiting line, to be served or refused: `begin` follows. The timeout starts again."""
        self._began = self._loop.time()

    def give_way(self) -> None:
        """Another connection needs the place now: end at once, without a gentle close."""
        if self._has_ended:
            self._stream.close()
            self._house.ended(self)
            return
        self._is_served = False
        self._end_from_outside(replies.TOO_MANY_CONNECTIONS, CloseReason.REFUSED)

    # Time --------------------------------------------------------------------------------------------------------

    def look_at_clock(self, now: float, until: float) -> bool:
        """Act on anything due at `now`, by the loop's clock: a deadline, the age of the segment.

        Returns:
            Whether something may be due before `until`; True if unknown.
        """
        if self._has_ended:
            return False
        age_left = self._house.segments.age_seconds - (time.monotonic_ns() - self.record.begun_ns) / 1e9
        if age_left <= 0 and not self._protocol.is_in_transaction:
            self._end_segment()
            age_left = self._house.segments.age_seconds
        if self._pauses & Pause.UNREAD:
            if now >= self._began + UNREAD_REPLIES_SECONDS:
                self._end_from_outside(None, CloseReason.TIMEOUT)
            return not self._has_ended
        if not self._is_reading:
            return True  # it will be once the current work is over, and may then have little time left
        deadline = self._deadline()
        if now >= deadline - CLOCK_SLACK_SECONDS:
            self._end_from_outside(replies.TIMED_OUT, CloseReason.TIMEOUT)
            return False
        # The client's next command has its own deadline.
        return min(deadline, now + self._policy.timeouts.shortest, now + age_left) < until

    @property
    def _is_reading(self) -> bool:
        """Whether it is the client's turn to speak."""
        return (
            self._is_served
            and self._task is None
            and self._protocol.asked is Asked.NOTHING
            and not self._pauses & Pause.CONTENT
        )

    def _deadline(self) -> float:
        """When the current request must be complete: octets buy time at the minimum rate, within a hard bound."""
        timeouts, protocol, octets = self._policy.timeouts, self._protocol, self._stream.octets_received
        if protocol.awaits_content:
            bought = (octets - self._request_octets) / timeouts.octets_per_second
            deadline = self._began + min(timeouts.command + bought, timeouts.data)
        elif self._house.is_stressed:
            deadline = self._began + min(timeouts.command, timeouts.command_under_stress)
        else:
            deadline = self._began + timeouts.command
        if protocol.has_open_content:
            # For the whole content, in however many chunks it comes.
            bought = (octets - self._content_octets) / timeouts.octets_per_second
            deadline = min(deadline, self._content_began + min(timeouts.command + bought, timeouts.data))
        return deadline if self._session_ends is None else min(deadline, self._session_ends)

    def drain(self) -> None:
        """The gateway shuts down: end the session now if it is between transactions, otherwise after the open one."""
        self._protocol.has_news = True
        if not self._protocol.is_in_transaction:
            self.cancel()

    def cancel(self) -> None:
        """The gateway shuts down, and waits no longer."""
        self._end_from_outside(replies.SHUTTING_DOWN, CloseReason.SHUTDOWN)

    def _end_from_outside(self, reply: Reply | None, reason: CloseReason) -> None:
        self._call(self._protocol.fail, reply, reason)

    # Segments ----------------------------------------------------------------------------------------------------

    def _end_full_segment(self, most: int) -> None:
        record = self.record
        if (
            not self._protocol.is_in_transaction
            or len(record.transitions) >= _HARD_SEGMENTS * most
            or len(record.replies) >= _HARD_SEGMENTS * most
        ):
            self._end_segment()

    def _end_segment(self) -> None:
        record, protocol = self.record, self._protocol
        record.messages = protocol.messages
        self._house.observer.segment_ended(record)
        record.begin_segment(time.monotonic_ns())
        protocol.recorded = record.transitions
        protocol.said = record.replies
        self._told = 0

    # The end -----------------------------------------------------------------------------------------------------

    def _finish(self, reason: CloseReason) -> None:
        if self._has_ended:
            return
        self._has_ended = self._is_busy = True
        stream, protocol, record = self._stream, self._protocol, self.record
        protocol.closed(reason)
        record.end = ConnectionEnd(stream.octets_received, stream.octets_sent, protocol.close_reason, protocol.now_ns)
        if self._house.observer.wants_transitions:
            self._tell_transitions()
        stream.receive_by(None)
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        self._house.observer.connection_closed(record)
        is_gentle = protocol.close_reason in _GENTLE_ENDS or any(
            reply is replies.BARE_LINE_FEED for _, reply in record.replies[-1:]
        )
        if self._is_served and is_gentle and not stream.is_eof:
            # The socket counts towards the limit of connections while it is open.
            self._task = self._loop.create_task(self._close_gently())
        else:
            stream.close()
            self._house.ended(self)

    async def _close_gently(self) -> None:
        try:
            await self._stream.close_gently()
        finally:
            self._house.ended(self)

    def _start(self, work: Callable[..., Coroutine[Any, Any, None]], *about: Any) -> None:
        """Do rare, long work in a task."""
        self._task = self._loop.create_task(self._run(work, about))

    async def _run(self, work: Callable[..., Coroutine[Any, Any, None]], about: Sequence[Any]) -> None:
        """The body of such a task: its end is a call from outside like any other."""
        mine = asyncio.current_task()
        try:
            await work(*about)
        except Exception:  # noqa: BLE001 - logged there
            self._log_failure()
            self._protocol.now_ns = time.monotonic_ns()
            self._protocol.fail(replies.INTERNAL_CLOSING, CloseReason.INTERNAL_ERROR)
        finally:
            if self._task is mine:
                self._task = None
        self._protocol.now_ns = monotonic_ns()
        self._step(None, _nothing_more)


@lru_cache(maxsize=1024)  # not `sys.intern`: Python 3.12 before 3.12.6 never frees interned strings
def _one_of_share(share: str) -> str:
    """Share one object among all connections of a share."""
    return share


def _nothing_more(_: None) -> None:
    """The empty work of a turn whose real work a task did."""
