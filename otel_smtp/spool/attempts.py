"""One attempt at one delivery: a transaction with the upstream relay, and recording its result.

A common attempt, whose content is in memory, is plain calls. A task reads other content from the store, piece by piece,
as fast as the upstream takes it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from otel_smtp.forwarding.base import DeliveryFailed, MailTransaction, Relay
from otel_smtp.observing import (
    DeliveryPhase,
    Fate,
    MessageKind,
    Observer,
    SpoolAction,
    TransactionRecord,
    trace_fields,
)
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.spool.dsn.notices import Notices
from otel_smtp.spool.dsn.report import NoticeKind
from otel_smtp.spool.messages import (
    ContentLost,
    End,
    Kind,
    Lease,
    SpoolError,
    StaleLease,
    StorageBroken,
    Verdict,
)
from otel_smtp.spool.store import Notice, Pending, Store

if TYPE_CHECKING:
    from otel_smtp.spool.outcomes.recording import Outcomes

logger: Final = logging.getLogger("otel_smtp.spool.attempts")

READ_OCTETS: Final = 256 * 1024
RECORD_AGAIN_SECONDS: Final = 1.0

# Looking a member up in its class costs as much as a call.
_MAIL: Final = Kind.MAIL
_DELIVERED: Final = End.DELIVERED

_make_verdict: Final = partial(tuple.__new__, Verdict)  # a NamedTuple's own constructor is a Python function

MESSAGE_KINDS: Final = {
    Kind.MAIL: MessageKind.MAIL,
    Kind.BOUNCE: MessageKind.BOUNCE,
    Kind.DELAY_WARNING: MessageKind.DELAY_WARNING,
    Kind.SUCCESS_REPORT: MessageKind.SUCCESS_REPORT,
    Kind.NOTIFICATION: MessageKind.BOUNCE,  # mostly
}
"""Their names in telemetry."""


class Recording:
    """Records results, with retries: an attempt whose result is not recorded will be repeated.

    Attributes:
        is_stopping: do not retry a result that cannot be recorded now.
    """

    def __init__(self, store: Store, observer: Observer) -> None:
        self._store = store
        self._observer = observer
        self.is_stopping = False

    async def record(
        self, lease: Lease, recording: Callable[[], Awaitable[None]], *, failed: SpoolError | None = None
    ) -> None:
        """Run `recording` until it succeeds, or never can.

        Args:
            failed: the error of a first run, if there was one.
        """
        while True:
            if failed is not None:
                if not self._may_succeed(lease, failed):
                    return
                await asyncio.sleep(RECORD_AGAIN_SECONDS)
            try:
                await recording()
            except SpoolError as error:
                failed = error
            else:
                return

    def _may_succeed(self, lease: Lease, error: SpoolError) -> bool:
        if isinstance(error, StaleLease):
            logger.error("delivery result discarded: lease ended", extra={**lease_fields(lease), "fault": str(error)})
            self._tell_superseded(lease)
            return False
        if isinstance(error, StorageBroken):
            logger.critical("delivery result not recorded", extra={**lease_fields(lease), "fault": str(error)})
            return False
        logger.error("delivery result not recorded yet", extra={**lease_fields(lease), "fault": str(error)})
        return not self.is_stopping

    def _tell_superseded(self, lease: Lease) -> None:
        """The trace already has the attempt and its result, so it must also show that this result does not count."""
        if lease.kind is Kind.OUTCOME:
            return
        record = TransactionRecord.resumed(
            lease.message_id, lease.carrier, lease.mail, kind=MESSAGE_KINDS[lease.kind], attempt=lease.attempt
        )
        record.action = SpoolAction.SUPERSEDED
        record.error_type, record.failure = ErrorType.TIMEOUT, "lease ended: another gateway makes the attempt again"
        record.end_in_spool((), record.begun_ns)
        self._observer.spool_acted(record)

    async def mark_corrupt(self, lease: Lease) -> None:
        """Set aside a message with damaged content."""
        logger.critical("queued content damaged; message set aside", extra=lease_fields(lease))
        loop = asyncio.get_running_loop()
        await self.record(lease, lambda: loop.create_task(self._store.mark_corrupt(lease)))


@dataclass(slots=True)
class Means:
    """The common means of all attempts of one runner.

    Attributes:
        outcomes: makes the outcomes for the application; None: it receives none.
        retry_in: gives the wait after an attempt of some number, in seconds.
        wake: called with destinations for which something waits now.
        judged: called once for each begun attempt, when the upstreams are done with it.
        ended: called once for each attempt, when its result is recorded.
        holds: whether a lease is still ours; None: no other process shares the store, so none can be lost.
    """

    store: Store
    relay: Relay
    notices: Notices
    recording: Recording
    observer: Observer
    retry_in: Callable[[int], float]
    wake: Callable[[Sequence[str]], None]
    judged: Callable[["Attempt"], None]
    ended: Callable[["Attempt"], None]
    holds: Callable[[Lease], bool] | None
    outcomes: "Outcomes | None" = None


class Attempt:
    """One attempt at one delivery.

    Args:
        content: the chunks, if in memory; the first is the header block.
        is_new: the lease came with the record that made the message durable.

    Attributes:
        in_line_since: when it began to wait for its upstream, if it did; in seconds of the monotonic clock.
    """

    __slots__ = (
        "_answers", "_content", "_has_content_left", "_header", "_is_judged", "_mail", "_means", "_record", "_room",
        "_task", "_transaction", "_verdicts", "in_line_since", "is_new", "lease",
    )  # fmt: skip

    def __init__(self, lease: Lease, content: Sequence[bytes] | None, means: Means, *, is_new: bool) -> None:
        self.lease = lease
        self.is_new = is_new
        self.in_line_since = 0.0
        self._means = means
        # Never deliver a part as the whole, whatever has happened to the chunks since they were stored.
        octets = lease.content.octets
        self._content = content if content is not None and sum(map(len, content)) == octets else None
        self._header = self._content[0] if means.outcomes is not None and self._content else None
        kind, self._mail = lease.kind, lease.mail
        self._record = record = TransactionRecord.resumed(
            lease.message_id,
            lease.carrier,
            self._mail,
            kind=MESSAGE_KINDS[kind],
            attempt=lease.attempt,
            is_possible_duplicate=lease.is_possible_duplicate,
            # A clock set back must not make it negative.
            waited_seconds=max(0.0, time.time() - lease.arrived_at) if kind is _MAIL else None,
        )
        if lease.taken_over is not None:
            record.taken_over = (lease.taken_over.gateway, lease.taken_over.silent_seconds)
        recipients = lease.recipients
        # Most have one recipient, and a comprehension is a call.
        record.accepted = [recipients[0][1]] if len(recipients) == 1 else [one.recipient for one in recipients]
        record.octets = octets
        self._transaction: MailTransaction | None = None
        self._answers: Sequence[Reply] = ()
        self._room: asyncio.Future[None] | None = None  # awaited by the reading task
        self._has_content_left = False  # from here on, the upstream may have taken it
        self._is_judged = False
        self._verdicts: Sequence[Verdict] = ()  # of a delivered message, until that is recorded
        if means.holds is not None:
            record.has_lost_lease = self._has_lost_its_lease
        self._task: asyncio.Task[None] | None = None  # slow work: reading the content, recording the result

    def start(self) -> None:
        """Begin."""
        if self.lease.is_possible_duplicate:
            logger.warning("message retried: the upstream may have it already", extra=lease_fields(self.lease))
        self._begin()

    def _begin(self) -> None:
        if self._is_judged or (self._means.holds is not None and self._has_lost_its_lease()):
            return
        try:
            if self.lease.kind is _MAIL:
                self._transaction = self._means.relay.begin(self._mail, self._record)
            else:
                # A notice always has a route: routes select by sender, and it has none.
                self._transaction = self._means.relay.begin_along(self.lease.destination, self._mail, self._record)
            self._transaction.recipients(self._record.accepted, self._recipients_answered)
        except DeliveryFailed as failure:
            self._judge([failure.reply] * len(self.lease.recipients))
        except Exception:  # noqa: BLE001 - it is logged
            self._fail()

    def give_back(self) -> None:
        """Do not begin: it becomes due at the next claim."""
        self._is_judged = True
        self._task = asyncio.get_running_loop().create_task(self._give_back())

    @property
    def has_said_nothing(self) -> bool:
        """Whether no upstream has been reached yet."""
        return not self._is_judged and not self._has_reached_one

    @property
    def _has_reached_one(self) -> bool:
        return any(delivery.peer for delivery in self._record.deliveries)

    @property
    def _may_have_left(self) -> bool:
        """Whether an upstream may have the content: sending was ordered, and there was a connection."""
        return self._has_content_left and self._has_reached_one

    async def cut_short(self) -> None:
        """End it now, to be repeated later; or wait until its result is recorded, if it has one."""
        if not self._is_judged:
            self._is_judged = True
            self._means.judged(self)
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
            self._abort()
            self._tell(())
            await self._means.recording.record(
                self.lease,
                lambda: self._means.store.finish(
                    self.lease, (), is_possible_duplicate=self._may_have_left, counts_attempt=self._has_reached_one
                ),
            )
            self._means.ended(self)
        elif self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    # The upstream ------------------------------------------------------------------------------------------------

    def _recipients_answered(self, answers: Sequence[Reply]) -> None:
        if self._is_judged:
            return
        self._answers = answers
        for answer in answers:
            if answer.is_positive:
                break
        else:
            self._abort()
            self._judge(answers)
            return
        if self._means.holds is not None and self._has_lost_its_lease():
            return
        try:
            self._has_content_left = True
            transaction, content = self._transaction, self._content
            assert transaction is not None
            if content:
                self._content = None
                transaction.message(content[0], b"".join(content[1:]), self._answered)
            else:
                transaction.content(self._go_on)
                self._task = asyncio.get_running_loop().create_task(self._read_and_write())
        except Exception:  # noqa: BLE001 - it is logged
            self._fail()

    def _go_on(self) -> None:
        """More can be taken: let the reading task write it."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def _read_and_write(self) -> None:
        assert self._transaction is not None
        content, header_octets = self.lease.content, self.lease.header_octets
        loop = asyncio.get_running_loop()
        try:
            if not await self._means.store.is_intact(content):
                raise ContentLost("the content is not what was written")
            starts = range(header_octets, content.octets, READ_OCTETS)
            for start, octets in ((0, header_octets), *((start, READ_OCTETS) for start in starts)):
                chunk = await self._means.store.read(content, start, octets)
                if self._has_lost_its_lease():
                    return
                self._room = loop.create_future()  # before the call, which may make room before it returns
                if chunk and not self._transaction.write(chunk):
                    await self._room
            if not self._has_lost_its_lease():
                self._transaction.finish(self._answered)
        except ContentLost:
            self._is_judged = True
            self._means.judged(self)
            self._record.failure = "spool: the content is damaged"
            self._abort()
            self._tell([(one.recipient, Fate.HELD, None) for one in self.lease.recipients])
            await self._means.recording.mark_corrupt(self.lease)
            self._means.ended(self)
        except SpoolError as error:
            # It cannot be read. No upstream has heard of the message yet.
            logger.error("queued message unreadable", extra={**lease_fields(self.lease), "fault": str(error)})
            self._abort()
            self._judge([replies.STORAGE_FAILED] * len(self.lease.recipients))
        except Exception:  # noqa: BLE001 - it is logged
            self._fail()

    def _answered(self, final: Reply, each: Sequence[Reply]) -> None:
        if self._is_judged:
            return
        # A recipient that has it already must not get it again because another was refused.
        own = iter(each)
        self._transaction = None
        self._judge([next(own, final) if answer.is_positive else answer for answer in self._answers])

    def _has_lost_its_lease(self) -> bool:
        """Whether another gateway may have the lease by now: then nothing more is sent, and no final dot."""
        holds = self._means.holds
        if holds is None or holds(self.lease):
            return False
        logger.warning("delivery attempt abandoned: its lease may have ended", extra=lease_fields(self.lease))
        self._abort()
        if not self._is_judged:
            self._means.judged(self)
            self.give_back()
        return True

    async def _give_back(self) -> None:
        """End it, to be repeated by the gateway that has the lease."""
        try:
            await self._means.recording.record(
                self.lease,
                lambda: self._means.store.finish(
                    self.lease, (),
                    is_possible_duplicate=self._may_have_left, counts_attempt=self._may_have_left,
                ),
            )  # fmt: skip
            self._means.wake((self.lease.destination,))
        finally:
            self._means.ended(self)

    def _abort(self) -> None:
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            transaction.abort()

    def _fail(self) -> None:
        """An internal error; called while the exception is handled."""
        logger.exception("delivery attempt failed: internal error", extra=lease_fields(self.lease))
        self._abort()
        self._judge([replies.INTERNAL] * len(self.lease.recipients))

    # The result --------------------------------------------------------------------------------------------------

    def _judge(self, answers: Sequence[Reply]) -> None:
        if self._is_judged:
            return
        lease, means = self.lease, self._means
        if lease.kind is not _MAIL and self._has_another_sender(answers):
            self._begin_again()
            return
        self._is_judged = True
        means.judged(self)
        recipients = lease.recipients
        if len(recipients) == 1 and means.outcomes is None and answers[0].is_positive:
            number, recipient, _ = recipients[0]
            if recipient.notify is None:
                self._verdicts = (_make_verdict((number, _DELIVERED, answers[0])),)
                self._tell(())
                means.store.finish(lease, self._verdicts, is_urgent=False).add_done_callback(self._recorded)
                return
        verdicts = [_verdict(one.number, answer) for one, answer in zip(recipients, answers, strict=True)]
        self._task = asyncio.get_running_loop().create_task(self._settle(verdicts))

    def _has_another_sender(self, answers: Sequence[Reply]) -> bool:
        """Whether the upstream refused a notice permanently that may be sent again from `notice_sender`."""
        return (
            bool(self._means.notices.sender)
            and not self._mail.reverse_path
            and any(answer.is_permanent for answer in answers)
            and not any(self._is_about_recipient(answer) for answer in answers)
        )

    def _is_about_recipient(self, refusal: Reply) -> bool:
        """Whether a notice was refused for its recipient, rather than for its sender or content."""
        deliveries = self._record.deliveries
        phases = deliveries[-1].phases if deliveries else ()
        if any(phase is DeliveryPhase.MAIL and reply is not None and reply.is_permanent for _, phase, reply in phases):
            return False
        status = refusal.enhanced
        if status is None:  # then the recipient's is what it was given alone, and not with the whole content
            return not deliveries or bool(deliveries[-1].refused)
        # RFC 3463 3.2: X.1.7 and X.1.8 are about the sender's address. 3.3: X.2.Y is about a mailbox.
        return status.subject == 2 or (status.subject == 1 and status.detail not in (7, 8))

    def _begin_again(self) -> None:
        """Some upstreams refuse the null sender (against RFC 5321 4.5.5), at MAIL, at RCPT or with the content."""
        said = self._record.deliveries[-1].reply if self._record.deliveries else None
        logger.warning("null sender refused, notice_sender is used", extra={**lease_fields(self.lease), **_codes(said)})
        self._mail = self._mail._replace(reverse_path=self._means.notices.sender)
        self._answers = ()
        self._room = self._task = self._content = None
        self._has_content_left = False
        asyncio.get_running_loop().call_soon(self._begin)

    def _recorded(self, done: Pending[None]) -> None:
        failed: SpoolError | None = None
        try:
            done.result()
        except SpoolError as error:
            failed = error
        except (Exception, asyncio.CancelledError):  # noqa: BLE001, S110 - it is recorded again, and reported then
            pass
        else:
            self._means.ended(self)
            return
        self._task = asyncio.get_running_loop().create_task(self._record_again(failed))

    async def _record_again(self, failed: SpoolError | None) -> None:
        """Record again that all of it was delivered, as observers already know."""
        lease, means = self.lease, self._means
        try:
            await means.recording.record(
                lease, lambda: means.store.finish(lease, self._verdicts, is_urgent=False), failed=failed
            )
        finally:
            means.ended(self)

    async def _settle(self, verdicts: Sequence[Verdict]) -> None:
        """Record its result, with the notices that are due."""
        lease = self.lease
        try:
            waiting = [verdict for verdict in verdicts if verdict.end is None]
            retry_in = self._means.retry_in(lease.attempt)
            if len(waiting) < len(verdicts) and all(_wants_another_transaction(verdict.reply) for verdict in waiting):
                retry_in = 0.0  # "should be ... sent in another transaction" (RFC 5321 4.5.3.1.10): at once
            is_unknown = any(
                verdict.reply is not None and verdict.reply.error_type is ErrorType.OUTCOME_UNKNOWN
                for verdict in verdicts
            )
            notices: Sequence[Notice] = ()
            is_held = lease.kind is not Kind.MAIL and any(
                verdict.end is End.FAILED and verdict.reply is not None and not self._is_about_recipient(verdict.reply)
                for verdict in verdicts
            )
            if is_held:
                # It could be sent if the upstream's or our settings were different: an operator must act.
                verdicts = [Verdict(one.number, None, one.reply) for one in verdicts]
                logger.error(
                    "notice refused permanently: held", extra={**lease_fields(lease), **_codes(verdicts[0].reply)}
                )
            try:
                notices = await self._notices_of(verdicts)
            except Exception:
                # Recipients that have the mail must not get it again because of this; refused ones are attempted once
                # more, and reported then.
                logger.exception("notice not created", extra=lease_fields(lease))
                verdicts = [
                    one if one.end is End.DELIVERED else Verdict(one.number, None, one.reply) for one in verdicts
                ]
            self._tell(self._fates(verdicts, has_bounced=bool(notices), is_held=is_held))
            outcomes: Sequence[Notice] = ()
            if self._means.outcomes is not None:
                outcomes = await self._means.outcomes.of(
                    lease, verdicts,
                    bounces=lambda one: bool(notices) and self._means.notices.bounces(lease, one),
                    upstream=self._record.deliveries[-1].upstream if self._record.deliveries else lease.destination,
                    header=self._header,
                )  # fmt: skip
            await self._means.recording.record(
                lease,
                lambda: self._means.store.finish(
                    lease, verdicts,
                    retry_in=retry_in, is_possible_duplicate=is_unknown, hold=is_held, notices=(*notices, *outcomes),
                    is_urgent=False,
                ),
            )  # fmt: skip
            if self._means.outcomes is not None:
                self._means.outcomes.stored(outcomes)
            if notices or any(verdict.end is None for verdict in verdicts):  # even if a notice was not created
                self._means.wake([destination for notice, _ in notices for destination in notice.deliveries])
        finally:
            self._means.ended(self)

    def _fates(
        self, verdicts: Sequence[Verdict], *, has_bounced: bool, is_held: bool
    ) -> Sequence[tuple[Recipient, Fate, Reply | None]]:
        """The fates of recipients that were not delivered to."""
        by_number = {one.number: one for one in self.lease.recipients}
        fates = []
        for verdict in verdicts:
            one = by_number[verdict.number]
            if verdict.end is End.DELIVERED:
                continue
            fate = Fate.HELD if is_held else Fate.DEFERRED
            if verdict.end is End.FAILED:
                bounces = has_bounced and self._means.notices.bounces(self.lease, one)
                fate = Fate.BOUNCED if bounces else Fate.REFUSED
            fates.append((one.recipient, fate, verdict.reply))
        return fates

    def _tell(self, fates: Sequence[tuple[Recipient, Fate, Reply | None]]) -> None:
        """Report the attempt to the observers; a delivery that continues only for the record is reported at its end."""
        self._record.end_in_spool(fates, time.monotonic_ns())
        # Nothing more of it is sent. This breaks a reference cycle that would wait for garbage collection.
        self._record.has_lost_lease = None
        for delivery in self._record.deliveries:
            if delivery.ended_ns:
                self._means.observer.delivery_ended(delivery)

    async def _notices_of(self, verdicts: Sequence[Verdict]) -> Sequence[Notice]:
        """The notices that are due for ended recipients."""
        lease = self.lease
        remote = self._record.deliveries[-1].server.host if self._record.deliveries else None
        by_number = {one.number: one for one in lease.recipients}
        notices: list[Notice] = []
        for end, kind in ((End.FAILED, NoticeKind.FAILED), (End.DELIVERED, NoticeKind.RELAYED)):
            ended = [(by_number[verdict.number], verdict.reply) for verdict in verdicts if verdict.end is end]
            if not ended:
                continue
            if end is End.FAILED:
                logger.warning(
                    "recipients refused permanently",
                    extra={**lease_fields(lease), "recipients": len(ended), **_codes(ended[0][1])},
                )
            elif self._means.relay.capabilities().dsn:
                continue  # the upstream has taken over the report of success (RFC 3461 5.2.1)
            notices += await self._means.notices.of(kind, lease, ended, remote=remote)
        return notices


def _verdict(number: int, reply: Reply) -> Verdict:
    if reply.is_positive:
        return Verdict(number, End.DELIVERED, reply)
    # A missing route is a fault of our settings, and no reason to bounce mail.
    if reply.is_permanent and reply is not replies.RELAY_DENIED:
        return Verdict(number, End.FAILED, reply)
    return Verdict(number, None, reply)


def _wants_another_transaction(reply: Reply | None) -> bool:
    return reply is not None and (reply.enhanced == replies.TOO_MANY_RECIPIENTS.enhanced or reply.code == 452)


def _codes(reply: Reply | None) -> dict[str, object]:
    if reply is None:
        return {}
    return {"code": reply.code, "enhanced_code": str(reply.enhanced) if reply.enhanced is not None else None}


def lease_fields(lease: Lease) -> dict[str, object]:
    """The log fields of a lease."""
    traceparent = lease.carrier.get("traceparent")
    named = {"spool_id": lease.message_id, "attempt": lease.attempt, "traceparent": traceparent}
    return {**named, **trace_fields(lease.carrier)}
