"""The forwarders of the queue modes: the spool alone, or the upstream first and the spool after a failure.

Both answer 250 only if the upstream did or the message is durable.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from otel_smtp.forwarding.base import (
    LEAST,
    Forwarder,
    MailTransaction,
    MessageAnswered,
    Permanent,
    RecipientsAnswered,
    Transient,
)
from otel_smtp.observing import TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.spool.intake import Intake
from otel_smtp.spool.store import Draft


class SpoolForwarder:
    """Mode `queue`: mail that any upstream can deliver is made durable, then answered."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._known: Extensions | None = None  # the upstream's, when last read, and the offer made from them
        self._offered = Extensions()

    def capabilities(self) -> Extensions:
        """The upstream's known extensions: mail that it would refuse later is better refused now.

        It need not offer DSN: the spool then sends the reports itself (RFC 3461 5.2.2).
        """
        known = self._intake.relay.capabilities()
        if known is not self._known:
            self._known, self._offered = known, replace(known, dsn=True)
        return self._offered

    def begin(self, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """Open a transaction.

        Raises:
            Permanent: no upstream would take it.
            Transient: none would now, or the spool takes nothing now.
        """
        relay = self._intake.relay
        if (refusal := relay.refusal(mail)) is not None:
            raise Transient(refusal) if refusal.is_transient else Permanent(refusal)
        if (refusal := self._intake.refusal(record)) is not None:
            raise Transient(refusal)
        if mail.body is Body.EIGHT_BIT_MIME and not record.is_8bit_offered and relay.capabilities() is not LEAST:
            return _QueuedIf7Bit(self._intake, mail, record)
        return _Queued(self._intake, mail, record)


class _Queued(MailTransaction):
    """A transaction that ends in the spool."""

    __slots__ = ("_answered", "_deliveries", "_draft", "_intake", "_mail", "_record", "_resume", "spool_id")

    def __init__(self, intake: Intake, mail: Mail, record: TransactionRecord) -> None:
        self._intake = intake
        self._mail = mail
        self._record = record
        self._deliveries: dict[str, list[Recipient]] = {}
        self._draft: Draft | None = intake.draft()  # tells the store that a message is on its way
        self._resume: Callable[[], None] | None = None
        self._answered: MessageAnswered | None = None
        self.spool_id: str | None = None

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""
        # Most have one, and a comprehension is a call.
        answered([self._accept(batch[0])] if len(batch) == 1 else [self._accept(recipient) for recipient in batch])

    def _accept(self, recipient: Recipient) -> Reply:
        destination = self._intake.relay.destination(self._mail, recipient)
        if isinstance(destination, Reply):
            return destination
        self._deliveries.setdefault(destination, []).append(recipient)
        return replies.RECIPIENT_OK

    def message(self, header: bytes, body: bytes, answered: MessageAnswered) -> None:
        """See `MailTransaction.message`."""
        assert self._draft is not None
        if self._draft.hold(header, body):
            self.finish(answered)
        else:
            super().message(header, body, answered)

    def content(self, resume: Callable[[], None]) -> None:
        """See `MailTransaction.content`."""
        self._resume = resume

    def write(self, chunk: bytes) -> bool:
        """See `MailTransaction.write`."""
        assert self._draft is not None
        assert self._resume is not None
        return self._draft.write(chunk, self._resume)

    def finish(self, answered: MessageAnswered) -> None:
        """See `MailTransaction.finish`."""
        assert self._draft is not None
        self._answered = answered
        self._intake.submit(self._mail, self._deliveries, self._draft, self._record, self._submitted)
        self._draft = None

    def _submitted(self, answer: str | Reply) -> None:
        if isinstance(answer, str):
            self.spool_id, answer = answer, replies.OK
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(answer, ())

    def abort(self) -> None:
        """See `MailTransaction.abort`."""
        self._answered = None
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.discard()


class _QueuedIf7Bit(_Queued):
    """A transaction that ends in the spool, unless the content is 8-bit, which no upstream takes and the client was not
    offered.
    """

    __slots__ = ()

    def finish(self, answered: MessageAnswered) -> None:
        """See `MailTransaction.finish`."""
        if self._draft is not None and self._draft.is_8bit:
            self.abort()
            answered(replies.NEEDS_8BITMIME, ())
        else:
            super().finish(answered)


class DirectThenQueueForwarder:
    """Mode `direct-then-queue`: the upstream answers the client, but temporary failures are queued."""

    def __init__(self, direct: Forwarder, intake: Intake) -> None:
        self._direct = direct
        self._intake = intake

    def capabilities(self) -> Extensions:
        """The upstream's."""
        return self._direct.capabilities()

    def begin(self, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """Open a transaction; errors as those of the upstream relay."""
        direct: MailTransaction | Reply
        try:
            direct = self._direct.begin(mail, record)
        except Transient as failure:
            if self._intake.refusal() is not None:
                raise
            direct = failure.reply
        return _DirectThenQueued(self._intake, direct, mail, record)


class _DirectThenQueued(MailTransaction):
    """A transaction with the upstream that may fall back to the spool at each step.

    Args:
        direct: the upstream's transaction; or the temporary reason why there is none.
    """

    __slots__ = (
        "_accepted", "_answered", "_deferred", "_direct", "_direct_is_full", "_draft", "_draft_is_full", "_intake",
        "_is_over", "_mail", "_record", "_refusal", "_refusals", "_resume", "spool_id",
    )  # fmt: skip

    def __init__(self, intake: Intake, direct: MailTransaction | Reply, mail: Mail, record: TransactionRecord) -> None:
        self._intake = intake
        self._direct = None if isinstance(direct, Reply) else direct
        self._refusal = direct if isinstance(direct, Reply) else replies.UPSTREAM_UNAVAILABLE
        self._mail = mail
        self._record = record
        self._accepted: list[Recipient] = []  # by the upstream
        self._deferred: list[Recipient] = []
        self._refusals: dict[str, Reply] = {}  # replies to the deferred, by address
        self._draft: Draft | None = None
        self._resume: Callable[[], None] | None = None
        self._answered: MessageAnswered | None = None
        self._direct_is_full = self._draft_is_full = False
        self._is_over = False
        self.spool_id: str | None = None

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""

        def judged(verdicts: Sequence[Reply]) -> None:
            if not self._is_over:
                answered([self._answer(recipient, verdict) for recipient, verdict in zip(batch, verdicts, strict=True)])

        if self._direct is None:
            judged([self._refusal] * len(batch))
        else:
            self._direct.recipients(batch, judged)

    def _answer(self, recipient: Recipient, verdict: Reply) -> Reply:
        if verdict.is_positive:
            self._accepted.append(recipient)
            return verdict
        if not verdict.is_transient or self._intake.refusal() is not None:
            return verdict
        destination = self._intake.relay.destination(self._mail, recipient)
        if isinstance(destination, Reply):
            return destination
        self._deferred.append(recipient)
        self._refusals[recipient.address] = verdict
        return replies.RECIPIENT_OK

    def content(self, resume: Callable[[], None]) -> None:
        """See `MailTransaction.content`."""
        self._resume = resume
        self._draft = self._intake.draft()
        if self._direct is None:
            return
        if self._accepted:
            self._direct.content(self._direct_has_room)
        else:  # all of it goes to the spool
            direct, self._direct = self._direct, None
            direct.abort()

    def write(self, chunk: bytes) -> bool:
        """See `MailTransaction.write`: the slower of the two sets the pace."""
        assert self._draft is not None
        # Set before the call, which may make room before it returns.
        self._draft_is_full = True
        if self._draft.write(chunk, self._draft_has_room):
            self._draft_is_full = False
        if self._direct is not None:
            self._direct_is_full = True
            if self._direct.write(chunk):
                self._direct_is_full = False
        return not (self._draft_is_full or self._direct_is_full)

    def _draft_has_room(self) -> None:
        self._draft_is_full = False
        self._go_on()

    def _direct_has_room(self) -> None:
        self._direct_is_full = False
        self._go_on()

    def _go_on(self) -> None:
        if not (self._draft_is_full or self._direct_is_full or self._is_over):
            assert self._resume is not None
            self._resume()

    def finish(self, answered: MessageAnswered) -> None:
        """See `MailTransaction.finish`."""
        self._answered = answered
        if self._direct is not None:
            self._direct.finish(self._settle)
        else:
            self._queue(self._accepted + self._deferred, None)

    def _settle(self, verdict: Reply, own: Sequence[Reply]) -> None:
        """Make the client's verdict from the upstream's, queueing the remaining recipients.

        If it took the mail for some recipients, the others go to the spool, even permanently refused ones: the client
        gets one reply, and the spool reports failures.
        """
        verdicts = [*own[: len(self._accepted)], *[verdict] * (len(self._accepted) - len(own))]
        if verdict.is_permanent and not any(one.is_positive for one in verdicts):
            # No recipient has it, and the client knows.
            self._answer_message(verdict, () if self._deferred else own)
            return
        left = [(one, reply) for one, reply in zip(self._accepted, verdicts, strict=True) if not reply.is_positive]
        waiting = [*(one for one, _ in left), *self._deferred]
        if not waiting:
            self._answer_message(verdict, own)
            return
        self._refusals.update((one.address, reply) for one, reply in left)
        self._queue(waiting, verdict)

    def _queue(self, waiting: Sequence[Recipient], verdict: Reply | None) -> None:
        assert self._draft is not None

        def submitted(answer: str | Reply) -> None:
            if isinstance(answer, str):
                self.spool_id, answer = answer, replies.OK
            elif verdict is not None and not verdict.is_positive:
                # Recipients that the upstream accepted may get it twice: the client keeps the mail, so none loses it.
                answer = verdict
            self._answer_message(answer)

        self._intake.submit(
            self._mail,
            self._by_destination(waiting),
            self._draft,
            self._record,
            submitted,
            # Recipients that wait for a limit were not attempted.
            refusals=self._refusals
            if any(one is not replies.UPSTREAM_PACED for one in self._refusals.values())
            else None,
            is_possible_duplicate=verdict is not None and verdict.error_type is ErrorType.OUTCOME_UNKNOWN,
        )
        self._draft = None

    def _by_destination(self, recipients: Sequence[Recipient]) -> Mapping[str, Sequence[Recipient]]:
        found: dict[str, list[Recipient]] = {}
        for recipient in recipients:
            destination = self._intake.relay.destination(self._mail, recipient)
            # Recipients accepted a moment ago have a destination; if the routes have changed since, an attempt will
            # report it.
            found.setdefault(destination if isinstance(destination, str) else "", []).append(recipient)
        return found

    def _answer_message(self, reply: Reply, own: Sequence[Reply] = ()) -> None:
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.discard()
        if not self._is_over:
            self._is_over = True
            assert self._answered is not None
            self._answered(reply, own)

    def abort(self) -> None:
        """See `MailTransaction.abort`: the upstream's part continues for the record only, and is not queued."""
        self._is_over = True
        if self._direct is not None:
            self._direct.abort()
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.discard()
