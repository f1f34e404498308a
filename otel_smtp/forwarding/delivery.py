"""One transaction upstream: what is said on a connection for one mail, and what the answers mean.

A transaction tells a `Delivery` what to do (`ask` about recipients, `send` the content, `burst` all of it), and learns
by one call back what came of it. In between it goes on by itself: each step queues commands, begins an exchange on its
connection, and names the step that takes the answers. Whatever is not an answer goes to `attempts`, which finds the
next connection; there what was accepted for the client is put to the upstream first, and must be accepted again.

* MAIL and the first recipients are one group, or all of a small message is.
* `has_ended_content` says that the final dot, or the last chunk, is on its way.

An upstream takes so many recipients in one transaction, as it announced or as it says at one too many. Those beyond are
left: the client was promised a place for them, and they go in a further transaction (see `further`).

A refused recipient in `burst` must refuse the whole. So nothing that ends the content is sent before all are known to
be accepted, but for a single recipient: where that is refused, the last chunk has nobody to go to.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from time import monotonic_ns
from typing import Final

from otel_smtp.forwarding.attempts import Attempts
from otel_smtp.forwarding.authentication import without_secrets
from otel_smtp.forwarding.base import MessageAnswered, RecipientsAnswered
from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.content import Content
from otel_smtp.forwarding.faults import ConnectionLost, CredentialsRefused, OutOfStep, Spent, UpstreamFault
from otel_smtp.forwarding.limits import WaitingMail
from otel_smtp.forwarding.settings import TracePolicy
from otel_smtp.forwarding.verdicts import fold, is_about_credentials, outcome_of, wants_another_transaction
from otel_smtp.observing import DeliveryPhase, Observer, Outcome, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import CONTENT, DATA, MAIL, RCPT, RSET, Answer, Awaited
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.extensions import is_ascii
from otel_smtp.smtp.received import TRACEPARENT_FIELD_OCTETS, replace_trace_headers
from otel_smtp.smtp.replies import ErrorType, Reply

logger: Final = logging.getLogger("otel_smtp.forwarding.delivery")

STALE_AFTER_SECONDS: Final = 5.0
"""A connection that was idle for longer is asked MAIL and RCPT before it is given content: were it dead, which shows
only then, a message sent in one piece would have an unknown outcome instead of another connection."""
BURST_OCTETS: Final = 256 * 1024
"""A message up to this size may leave with its envelope: what is lost of it in the middle has an unknown outcome."""
ONE_PIECE_OCTETS: Final = 64 * 1024
"""Content up to this size is joined and sent in one write; joining more costs more than the further writes."""

MOST_TRANSACTIONS: Final = 50
"""Into which one message is divided; a thousand recipients are ten of the size that any server takes."""

_TO_BE_REENCODED: Final = replies.NEEDS_8BITMIME.with_text("to be re-encoded")  # never sent to a client

_MAIL: Final = frozenset({RSET, MAIL})
_ENVELOPE: Final = frozenset({RSET, MAIL, RCPT})
_PHASES: Final[dict[Awaited | None, DeliveryPhase]] = {
    MAIL: DeliveryPhase.MAIL,
    DATA: DeliveryPhase.DATA,
    CONTENT: DeliveryPhase.REPLY,
}
# See `smtp.client.answers` for why such names are here.
_CONTENT_ENDED: Final = DeliveryPhase.CONTENT
_RELAYED: Final = Outcome.RELAYED
_INJECT: Final = TracePolicy.INJECT
_STRIP: Final = TracePolicy.STRIP


class Delivery(Attempts):
    """One transaction upstream.

    Attributes:
        accepted: recipients that go with the content; those of `ask` are added here as they are accepted.
        left: those that were promised a place in a further transaction. `wants_fresh`: on a connection that was not
            used before, as the limit that they met may be that of the connection.
    """

    __slots__ = (
        "_after",
        "_asked",
        "_content",
        "_delivered",
        "_header",
        "_is_full",
        "_judged",
        "_mail_refusal",
        "_more",
        "_promised",
        "_read",
        "_refusal",
        "_sent_octets",
        "_sent_pieces",
        "accepted",
        "left",
        "wants_fresh",
    )

    _after: "Callable[[Delivery, list[Answer]], None]"  # the step that takes the answers
    # Set when they are needed.
    _content: Content
    _header: bytes
    _sent_octets: int
    _sent_pieces: int

    def __init__(
        self, mail: Mail, record: TransactionRecord, observer: Observer, ended_alone: "Callable[[Delivery], None]"
    ) -> None:
        super().__init__(mail, record, observer, ended_alone)
        self.accepted: list[Recipient] = []
        self.left: list[Recipient] = []
        self.wants_fresh = False
        self._is_full = False  # nobody else is asked about
        self._promised: list[Recipient] | None = None  # see `promised`; None: nobody was left
        self._asked: Sequence[Recipient] = ()
        self._judged: RecipientsAnswered | None = None
        self._delivered: MessageAnswered | None = None
        self._refusal: Reply | None = None  # the last one, of a recipient or of MAIL
        self._mail_refusal: Reply | None = None
        self._more: WaitingMail | None = None  # leave for further recipients
        self._read: dict[Recipient, Reply] = {}  # refusals that were read before the connection was lost

    # What a transaction asks ------------------------------------------------------------------------------

    def ask(self, recipients: Sequence[Recipient], judged: RecipientsAnswered) -> None:
        """Put recipients to the upstream, with MAIL before the first ones, in one group.

        `judged` gets one reply each. Where MAIL was refused, its refusal is that of each.
        """
        if self._mail_refusal is not None:
            judged([self._mail_refusal] * len(recipients))
            return
        if self._is_full:
            judged([self._promise(recipient) for recipient in recipients])
            return
        self._asked = recipients
        self._judged = judged
        self._work = Delivery._put
        if self.is_under_way and (pace := self._smarthost.pace) is not None and pace.counts_recipients:
            left = self._smarthost.most_recipients - len(self.accepted)
            more = self._more = pace.ask(
                max(0, min(left, len(recipients))), self.patience_seconds, self._more_decided, with_message=False
            )
            if more is None:
                self._answer_for_all(replies.UPSTREAM_PACED)
                return
            if more.is_waiting:
                return
            self._join_leave(more)
        self._proceed()

    def _more_decided(self, is_given: bool) -> None:
        assert self._more is not None
        self._note_wait(self._more)
        if is_given:
            self._join_leave(self._more)
            self._proceed()
        else:
            self._answer_for_all(replies.UPSTREAM_PACED)

    def _join_leave(self, more: WaitingMail) -> None:
        assert self._permission is not None
        self._permission.permits += more.permits

    def _recipients_to_come(self) -> int:
        """See `Attempts`."""
        asked = len(self._asked) if self._judged is not None else 0
        return min(len(self.accepted) + asked, self._smarthost.most_recipients)

    def _has_ascii_recipients(self) -> bool:
        """See `Attempts`."""
        asked = self._asked if self._judged is not None else ()
        return all(map(is_ascii, self.accepted)) and all(map(is_ascii, asked))

    def send(self, content: Content, delivered: MessageAnswered) -> None:
        """Send the content to the recipients that were accepted."""
        self._content = content
        self._delivered = delivered
        self._work = Delivery._send
        self._proceed()

    def burst(self, content: Content, delivered: MessageAnswered) -> None:
        """Do all of it: one round trip with CHUNKING, for a single recipient and a small message; else two.

        `delivered` gets the reply to the message, or the first refusal on the way: then nobody got anything.
        """
        self._content = content
        self._delivered = delivered
        self._work = Delivery._burst
        self._proceed()

    def abort(self) -> None:
        """Nobody waits for an answer any more. A message that is out of our hands comes to its end for the record."""
        self._is_aborted = True
        self._judged = self._delivered = None
        if self._more is not None and self._more.is_waiting:
            assert self._smarthost.pace is not None
            self._smarthost.pace.withdraw(self._more)
        if not self.is_under_way or self.has_ended_content:
            return
        self._stop()
        refusal = self._refusal
        if refusal is not None and not self.accepted and self._is_connected:
            error_type = ErrorType.UPSTREAM_AUTH if is_about_credentials(refusal) else refusal.error_type
            self._end(outcome_of(refusal), refusal, error_type, answered=True)
        else:
            self._end(Outcome.ABORTED, None, None)

    @property
    def promised(self) -> Sequence[Recipient]:
        """Those that were accepted and those that are left, in the order in which they came."""
        return self.accepted if self._promised is None else self._promised

    # Recipients beyond what one transaction takes ---------------------------------------------------------

    def _promise(self, recipient: Recipient) -> Reply:
        """Leave a recipient that was not asked about, or is one too many."""
        # What a fresh connection took is what one takes.
        is_measured = self.wants_fresh and not self._was_reused
        most = max(1, len(self.accepted)) if is_measured else self._connection.most_recipients
        if len(self.left) >= (MOST_TRANSACTIONS - 1) * most:
            return replies.TOO_MANY_RECIPIENTS
        if self._promised is None:
            self._promised = list(self.accepted)
        self._is_full = True
        self.left.append(recipient)
        self._promised.append(recipient)
        return replies.RECIPIENT_OK

    def _leave(self, numbers: Collection[int]) -> None:
        """Leave some that had been accepted: this upstream takes fewer than the one before, or than was known.

        Args:
            numbers: their places among the accepted.
        """
        if self._promised is None:
            self._promised = list(self.accepted)
        self._is_full = True
        self.left += [recipient for number, recipient in enumerate(self.accepted) if number in numbers]
        self.accepted = [recipient for number, recipient in enumerate(self.accepted) if number not in numbers]

    def _note_limit(self) -> None:
        """There was one too many for the transaction, or for the connection: nobody knows which."""
        self.wants_fresh = True
        self._connection.is_spent = True

    def _check_quota(self, refusal: Reply) -> None:
        """Raise what makes the refusal of the first recipients no answer: those of earlier mails may have used up what
        the connection takes."""
        if self._was_reused and self._smarthost not in self._tried_again:
            self.has_ended_content = False
            self._connection.is_spent = True
            raise Spent("recipients refused on a connection that has served before", upstream_reply=refusal)

    # Answers ----------------------------------------------------------------------------------------------

    def _settled(self, answers: list[Answer], fault: UpstreamFault | None) -> None:
        """An exchange is over: note what was answered, and take the next step."""
        try:
            now_ns = monotonic_ns()
            attempt = self._attempt
            for verb, reply in answers:
                if verb is RCPT:
                    attempt.recipient_phase(now_ns, reply)
                elif (phase := _PHASES.get(verb)) is not None:
                    attempt.phases.append((now_ns, phase, reply))
            if fault is not None:
                self._cut_short(answers, fault)
                return
            if answers[0][0] is RSET:
                self._check_reset(answers.pop(0).reply)
            # The answer may have been long in coming, and this process stopped meanwhile.
            if self._record.has_lost_lease is not None and self._may_not_go_on():
                return
            self._after(self, answers)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _cut_short(self, answers: list[Answer], fault: UpstreamFault) -> None:
        """The answers ended early; what is known of the message all the same counts."""
        if answers and answers[-1].reply.code == 421:
            answers = answers[:-1]
            said_goodbye = True
        else:
            said_goodbye = False
        if not isinstance(fault, ConnectionLost):
            if self.has_ended_content and (refusal := _refusal(answers)) is not None:
                self._conclude(refusal)
                return
            raise fault
        if answers and answers[0].verb is RSET:
            answers = answers[1:]
        verdicts = [reply for verb, reply in answers if verb is CONTENT]
        if verdicts:
            # LMTP: these are known. Of the others nobody knows, or 421 says that they do not have it.
            verdicts = [self._as_told(verdict) for verdict in verdicts]
            rest = fault.told if said_goodbye else replies.OUTCOME_UNKNOWN
            verdicts += [rest] * (len(self.accepted) - len(verdicts))
            self._conclude(fold(verdicts), verdicts)
            return
        refusal = _refusal(answers)
        if self._delivered is not None and refusal is not None and self._work is Delivery._burst:
            # Whatever comes behind it, the message is refused, and nobody got it.
            self._refused_in_burst(answers)
            return
        if self._work is Delivery._put and not self._is_open and answers:
            if answers[0].reply.code >= 400:
                self._sender_refused(answers[0].reply)
                return
            self._keep_refusals(answers[1 + len(self.accepted) :])
        elif self._work is Delivery._put:
            self._keep_refusals(answers)
        if said_goodbye:
            self.has_ended_content = False
        raise fault

    def _keep_refusals(self, answers: Sequence[Answer]) -> None:
        """Note who was refused, for the case that nobody can be asked again."""
        for recipient, (_, verdict) in zip(self._asked, answers, strict=False):
            if verdict.code >= 400:
                self._read[recipient] = told = self._as_told(verdict)
                self._attempt.refuse(recipient, told, monotonic_ns())

    def _check_reset(self, reply: Reply) -> None:
        if reply.code >= 400:
            # What it keeps of the transaction before is anybody's guess.
            self._connection.close()
            raise OutOfStep("RSET refused")

    def _answer_for_all(self, reply: Reply) -> None:
        """Tell who waits that it came to nothing."""
        judged, self._judged = self._judged, None
        delivered, self._delivered = self._delivered, None
        if judged is not None:
            judged([self._read.get(recipient, reply) for recipient in self._asked])
        elif delivered is not None:
            delivered(reply, ())

    def _refused_by(self, refusal: Reply) -> None:
        """MAIL was refused: so is whatever is asked."""
        self._refusal = self._mail_refusal = refusal
        self._end(outcome_of(refusal), refusal, refusal.error_type, answered=True)
        self._answer_for_all(refusal)

    def _as_told(self, refusal: Reply) -> Reply:
        """The reply to the client for a refusal: one about our credentials is not about the mail."""
        if refusal.code < 530 or not is_about_credentials(refusal):
            return refusal
        fault = CredentialsRefused(self._without_secrets(refusal))
        self._smarthost.credentials_refused(fault)
        return fault.told

    def _without_secrets(self, refusal: Reply) -> Reply:
        credentials = self._smarthost.settings.credentials
        return refusal if credentials is None else without_secrets(refusal, credentials)

    def _check_sender_refusal(self, refusal: Reply) -> None:
        """Raise what makes a refusal of MAIL no answer to the mail."""
        if is_about_credentials(refusal):
            self.has_ended_content = False
            raise CredentialsRefused(self._without_secrets(refusal))
        if refusal.is_transient and self._was_reused and self._may_try_again:
            self.has_ended_content = False
            self._connection.is_spent = True
            raise Spent("MAIL refused on a connection that has served before", upstream_reply=refusal)

    # The transparent way ----------------------------------------------------------------------------------

    def _put(self) -> None:
        """Put the recipients that are asked about; where an upstream takes over from another, those before as well."""
        connection = self._connection
        asked = self._asked
        accepted: Sequence[Recipient] = self.accepted
        most = connection.most_recipients
        if not self._is_open:
            if accepted:
                accepted = self._fitting()
        elif self._mail.smtputf8 and not connection.protocol.extensions.smtputf8 and not all(map(is_ascii, asked)):
            self._pass_by(replies.UPSTREAM_LACKS_SMTPUTF8)
            return
        if self._is_full or len(accepted) + len(asked) > most:
            asked = asked[: most - len(accepted)]
            self._is_full = True
            if not asked and self._is_open:
                self._recipients_answered([])
                return
        if self._is_open:
            connection.protocol.send_envelope(None, asked)
        else:
            self._send_envelope(None, [*accepted, *asked] if accepted else asked)
        self._after = Delivery._recipients_answered
        connection.exchange(self._settled, stop_at=_MAIL)

    def _recipients_answered(self, answers: list[Answer]) -> None:
        accepted = self.accepted
        before = len(accepted)
        if not self._is_open:
            _, refusal = answers[0]
            if refusal.code >= 400:
                self._sender_refused(refusal)
                return
            self._is_open = True
            del answers[0]
            if before:
                self._check_accepted_before(answers[:before])
                del answers[:before]
                accepted = self.accepted
                before = len(accepted)
        verdicts: list[Reply] = []
        beyond: list[int] = []
        for recipient, (_, verdict) in zip(self._asked, answers, strict=False):
            verdicts.append(verdict)
            if verdict.code < 400:
                accepted.append(recipient)
            elif verdict.code in (452, 552) and wants_another_transaction(verdict):
                beyond.append(len(verdicts) - 1)
            else:
                self._refuse(recipient, verdicts)
        if beyond or self._is_full:
            self._divide(before, verdicts, beyond)
        judged, self._judged = self._judged, None
        if judged is not None:
            # The connection is left alone until the client says something: it may be taken away meanwhile.
            self._is_parked = True
            self._smarthost.park(self._connection, asyncio.get_running_loop().time(), self._reclaimed)
            judged(verdicts)

    def _check_accepted_before(self, answers: Sequence[Answer]) -> None:
        """Look at what another connection says of those that were accepted before."""
        beyond = set()
        for number, (_, verdict) in enumerate(answers):
            if verdict.code >= 400:
                if not wants_another_transaction(verdict):
                    raise UpstreamFault("what another upstream had accepted is refused", upstream_reply=verdict)
                beyond.add(number)
        if not beyond:
            return
        if len(beyond) == len(answers):
            self._check_quota(answers[0].reply)
            raise UpstreamFault("what another upstream had accepted is refused", upstream_reply=answers[0].reply)
        self._note_limit()
        self._leave(beyond)

    def _refuse(self, recipient: Recipient, verdicts: list[Reply]) -> None:
        """Note that a recipient is refused with the last of `verdicts`, and replace that by the reply to the client."""
        verdict = self._refusal = verdicts[-1]
        if verdict.code >= 530:
            verdicts[-1] = self._as_told(verdict)
        self._attempt.refuse(recipient, verdicts[-1], monotonic_ns())

    def _divide(self, before: int, verdicts: list[Reply], beyond: Collection[int]) -> list[Reply]:
        """Leave the recipients of this group that are too many for the transaction.

        Args:
            before: how many had been accepted before them.
            verdicts: on those that were asked about.
            beyond: numbers of those that were one too many.

        Returns:
            `verdicts`, completed.
        """
        asked = self._asked
        if beyond and not self.accepted:
            # One too many beside nobody is a refusal like any other.
            self._check_quota(verdicts[min(beyond)])
            for number in beyond:
                self._refusal = verdicts[number]
                self._attempt.refuse(asked[number], verdicts[number], monotonic_ns())
            beyond = ()
        if beyond:
            self._note_limit()
        promised = self._promised = self.accepted[:before] if self._promised is None else self._promised
        for number, recipient in enumerate(asked):
            if number >= len(verdicts):
                verdicts.append(self._promise(recipient))
            elif number in beyond:
                verdicts[number] = self._promise(recipient)
            elif verdicts[number].code < 400:
                promised.append(recipient)
        return verdicts

    def _sender_refused(self, refusal: Reply) -> None:
        self._check_sender_refusal(refusal)
        if self.accepted:
            raise UpstreamFault("a sender that another upstream had accepted is refused", upstream_reply=refusal)
        self._refused_by(refusal)

    def _may_not_go_on(self) -> bool:
        """Whether the message may be another gateway's by now, with its content not all sent: this was aborted then."""
        has_lost_lease = self._record.has_lost_lease
        return has_lost_lease is not None and not self.has_ended_content and has_lost_lease()

    def _send(self) -> None:
        if not self._is_open:
            # What was accepted elsewhere is put to this upstream before it gets the content.
            self._send_envelope(None, self._fitting())
            self._after = Delivery._reopened
            self._connection.exchange(self._settled, stop_at=_MAIL)
        elif (refusal := self._unfit()) is not None:
            self._decline(refusal)
        elif self._connection.protocol.extensions.chunking:
            self._write()
        else:
            self._ask_for_content()

    def _reopened(self, answers: list[Answer]) -> None:
        refusal = answers[0].reply
        if refusal.code >= 400:
            self._check_sender_refusal(refusal)
            raise UpstreamFault("what another upstream had accepted is refused", upstream_reply=refusal)
        self._check_accepted_before(answers[1:])
        self._is_open = True
        self._send()

    # The buffered way -------------------------------------------------------------------------------------

    def _burst(self) -> None:
        if self._record.has_lost_lease is not None and self._may_not_go_on():
            return
        if (refusal := self._unfit()) is not None:
            self._decline(refusal)
            return
        protocol, content = self._connection.protocol, self._content
        extensions = protocol.extensions
        self._send_envelope(len(self._header) + content.body_octets, self._fitting())
        if content.pieces is not None and self._may_be_all_in_one():
            protocol.send_last_chunk(self._header, *content.pieces)
            self._end_content()
            return
        if extensions.pipelining and not extensions.chunking:
            protocol.send_data()
        self._after = Delivery._envelope_answered
        self._connection.exchange(self._settled, stop_at=_ENVELOPE)

    def _may_be_all_in_one(self) -> bool:
        extensions = self._connection.protocol.extensions
        return (
            extensions.chunking
            and extensions.pipelining
            and len(self.accepted) == 1
            and self._content.body_octets <= BURST_OCTETS
            and not (self._was_reused and self._connection.idle_seconds > STALE_AFTER_SECONDS)
        )

    def _envelope_answered(self, answers: list[Answer]) -> None:
        self._is_open = answers[0].reply.is_positive
        last = answers[-1]
        if (refusal := _refusal(answers)) is not None and not self._is_divided(answers):
            if last.verb is DATA and last.reply.code < 400:
                self._note_refused(answers)
                self._take_back_data(refusal)
            else:
                self._refused_in_burst(answers)
        elif last.verb is DATA:
            self._data_answered([last])
        elif self._connection.protocol.extensions.chunking:
            self._write()
        else:
            self._ask_for_content()

    def _is_divided(self, answers: Sequence[Answer]) -> bool:
        """Whether those that were refused were one too many beside others, and no more: they are left."""
        verdicts = [reply for verb, reply in answers if verb is RCPT]
        beyond = {number for number, verdict in enumerate(verdicts) if verdict.code >= 400}
        if not (0 < len(beyond) < len(verdicts) and all(wants_another_transaction(verdicts[one]) for one in beyond)):
            return False
        self._note_limit()
        # Without PIPELINING those after the first refusal were not asked about.
        self._leave({*beyond, *range(len(verdicts), len(self.accepted))})
        return True

    def _refused_in_burst(self, answers: Sequence[Answer]) -> None:
        """MAIL or a recipient was refused, and with it the message."""
        refusal = _refusal(answers)
        assert refusal is not None
        if answers[0].reply.code >= 400:
            self._check_sender_refusal(refusal)
        else:
            if wants_another_transaction(refusal) and not any(
                verb is RCPT and reply.code < 400 for verb, reply in answers
            ):
                self._check_quota(refusal)
            self._note_refused(answers)
        self._conclude(refusal)

    def _note_refused(self, answers: Sequence[Answer]) -> None:
        """Note for whom a message was refused before its content counted."""
        verdicts = [reply for verb, reply in answers if verb is RCPT]
        for recipient, verdict in zip(self.accepted, verdicts, strict=False):
            if verdict.code >= 400:
                self._attempt.refuse(recipient, self._as_told(verdict), monotonic_ns())

    def _take_back_data(self, refusal: Reply) -> None:
        """Get out of a DATA that was answered with 354 although the message must not be sent."""
        protocol = self._connection.protocol
        if protocol.accepted_recipients:
            # A lone dot would deliver an empty message to those that were accepted. Only the end of the connection
            # takes DATA back.
            self._connection.close()
            self._conclude(refusal)
            return
        # RFC 2920 3.1: "the client cannot assume that the DATA command will be rejected just because none of the RCPT
        # TO commands worked"; then a lone dot ends it, and nobody is there to get the empty message.
        protocol.end_content()
        self._refusal = refusal
        self._after = Delivery._data_taken_back
        self._connection.exchange(self._settled)

    def _data_taken_back(self, _: list[Answer]) -> None:
        if self._refusal is not None:
            self._conclude(self._refusal)

    # Content ----------------------------------------------------------------------------------------------

    def _unfit(self) -> Reply | None:
        """Make the header block that leaves, and say why this upstream cannot take the message; None where it can."""
        content, extensions = self._content, self._connection.protocol.extensions
        if content.original is not None and extensions.eight_bit_mime:
            content = self._content = content.original  # it was made 7-bit for an upstream before this one
        header = content.header
        policy = self._smarthost.settings.trace_context
        if policy is _INJECT:
            header = replace_trace_headers(header, self._observer.delivery_carrier(self._attempt))
        elif policy is _STRIP and b"trace" in header.lower():
            header = replace_trace_headers(header, {})
        self._header = header
        reencodes = self._smarthost.settings.reencode_8bit
        if (
            not extensions.eight_bit_mime
            and (reencodes or self._mail.body is Body.EIGHT_BIT_MIME)
            and content.original is None
            and content.is_8bit
        ):
            if reencodes:
                return _TO_BE_REENCODED
            # Promised in good faith: another upstream, or this one another time, may take it.
            return replies.UPSTREAM_LACKS_8BITMIME if self._record.is_8bit_offered else replies.NEEDS_8BITMIME
        if self._mail.smtputf8 and not extensions.smtputf8 and content.is_8bit:
            return replies.UPSTREAM_LACKS_SMTPUTF8  # it was offered: else such content would have been refused before
        if extensions.size and len(header) + content.body_octets > extensions.size:
            return replies.MESSAGE_TOO_BIG
        return None

    def _decline(self, refusal: Reply) -> None:
        """This upstream cannot take the message. For good, if no other one serves it, here or later."""
        if refusal is _TO_BE_REENCODED:
            self._content.reencode(partial(self._content_reencoded, self._connection))
        elif self.route or self._faults:
            self._pass_by(refusal)
        else:
            self._conclude(refusal)

    def _content_reencoded(self, connection: UpstreamConnection, made: Content | Reply) -> None:
        """Go on with the same work and what was made for it."""
        if not self._is_connected or connection is not self._connection:
            return  # lost meanwhile
        if isinstance(made, Content):
            self._content = made
            self._proceed()
            return
        try:
            if made.is_permanent:
                self._decline(made)
            else:
                self._end(Outcome.ABORTED, None, None)
                self._answer_for_all(made)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _ask_for_content(self) -> None:
        self._connection.protocol.send_data()
        self._after = Delivery._data_answered
        self._connection.exchange(self._settled)

    def _data_answered(self, answers: list[Answer]) -> None:
        reply = answers[0].reply
        if reply.code >= 400:
            self._conclude(reply)
        else:
            self._write()

    def _write(self) -> None:
        """Write the content with its end, a small message in one piece, and wait for the reply to it."""
        protocol, content = self._connection.protocol, self._content
        octets = len(self._header) + content.body_octets
        if content.pieces is None or octets > ONE_PIECE_OCTETS:
            self._write_large(octets)
            return
        if protocol.extensions.chunking:
            protocol.send_last_chunk(self._header, *content.pieces)
        else:
            for piece in (self._header, *content.pieces):
                protocol.send_content(piece)
            protocol.end_content()
        self._end_content()

    def _write_large(self, octets: int) -> None:
        protocol = self._connection.protocol
        if protocol.extensions.chunking:
            protocol.begin_last_chunk(octets)
        self._sent_octets = self._sent_pieces = 0
        self._after = Delivery._refused_early
        self._put_content(self._header)
        if self._connection.send_content(self._settled, self._writable):
            self._write_more()

    def _put_content(self, piece: bytes) -> None:
        protocol = self._connection.protocol
        if protocol.extensions.chunking:
            protocol.send_chunk_octets(piece)
        else:
            protocol.send_content(piece)

    def _writable(self) -> None:
        try:
            if self._record.has_lost_lease is None or not self._may_not_go_on():
                self._write_more()
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _write_more(self) -> None:
        """Write the rest of the body, as fast as the upstream takes it; the last piece leaves with the end."""
        content = self._content
        while self._sent_octets < content.body_octets:
            if content.pieces is None:
                content.read(self._sent_octets, partial(self._piece_read, self._connection))
                return
            self._sent_pieces += 1
            if not self._write_piece(content.pieces[self._sent_pieces - 1]):
                return
        if not self._connection.protocol.extensions.chunking:
            self._connection.protocol.end_content()
        self._end_content()

    def _write_piece(self, piece: bytes) -> bool:
        """Write a piece, but keep the last one back; whether to go on at once."""
        self._put_content(piece)
        self._sent_octets += len(piece)
        is_last = self._sent_octets >= self._content.body_octets
        return is_last or self._connection.send_content(self._settled, self._writable)

    def _piece_read(self, connection: UpstreamConnection, piece: bytes | None) -> None:
        if not self._is_connected or connection is not self._connection:
            return  # lost meanwhile
        try:
            if piece is None:
                self._end(Outcome.ABORTED, None, None)
                self._answer_for_all(replies.STORAGE_FAILED)
            elif not self._may_not_go_on() and self._write_piece(piece):
                self._write_more()
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _refused_early(self, answers: list[Answer]) -> None:
        """The upstream refuses the content before its end; the connection cannot be used again then."""
        self._conclude(answers[-1].reply)

    def _end_content(self) -> None:
        """Send what is queued, the end of the content with it, and wait for the reply to the message."""
        self.has_ended_content = True
        self._attempt.phases.append((monotonic_ns(), _CONTENT_ENDED, None))
        self._after = Delivery._message_answered
        self._connection.exchange(self._settled)

    def _message_answered(self, answers: list[Answer]) -> None:
        if len(answers) == 1:
            self._conclude(answers[0][1])
            return
        if _refusal(answers) is not None:
            self._refused_in_burst(answers)
            return
        if answers[-2][0] is not CONTENT:  # one reply for all
            self._conclude(answers[-1][1])
            return
        verdicts = [self._as_told(reply) for verb, reply in answers if verb is CONTENT]
        self._conclude(fold(verdicts), verdicts)

    # The end of an attempt --------------------------------------------------------------------------------

    def _conclude(self, reply: Reply, verdicts: Sequence[Reply] = ()) -> None:
        """The message has its reply."""
        attempt = self._attempt
        error_type = reply.error_type
        own = reply if error_type is None or error_type is ErrorType.UPSTREAM_REFUSED else None
        if reply.code < 400:
            self._connection.needs_reset = False
            outcome = _RELAYED
        else:
            if reply.code >= 530:
                reply = self._as_told(reply)
            outcome = outcome_of(reply)
        if len(verdicts) > 1 and outcome is not _RELAYED:
            for recipient, verdict in zip(self.accepted, verdicts, strict=False):
                if verdict.code >= 400:
                    attempt.accepted_count -= 1
                    attempt.refuse(recipient, verdict, monotonic_ns())
                elif outcome is not Outcome.UNKNOWN:
                    outcome = Outcome.PARTLY_RELAYED
        elif outcome is _RELAYED and attempt.refused:
            outcome = Outcome.PARTLY_RELAYED
        self._end(outcome, own, reply.error_type, answered=True)
        delivered, self._delivered = self._delivered, None
        if delivered is not None:
            delivered(reply, verdicts if len(verdicts) > 1 else ())
        else:
            logger.info("message outcome after its client left", extra={**self._named(), "code": reply.code})

    # ------------------------------------------------------------------------------------------------------

    def _fitting(self) -> Sequence[Recipient]:
        """Those that were accepted before, as far as this upstream takes so many at once; the others are left."""
        most = self._connection.most_recipients
        if len(self.accepted) > most:
            self._leave(range(most, len(self.accepted)))
        return self.accepted

    def _send_envelope(self, octets: int | None, recipients: Sequence[Recipient]) -> None:
        """Queue MAIL and its first recipients.

        Args:
            octets: of all that leaves; None: what the client sent counts, else what it declared, and the fields that
                we add to it: the declaration is of the message as it is transmitted here (RFC 1870 6.1).
        """
        connection = self._connection
        if octets is None:
            record = self._record
            octets = self._mail.size if record.octets is None else record.octets
            if octets is not None:
                octets += record.added_octets
                if self._smarthost.settings.trace_context is _INJECT:
                    octets += TRACEPARENT_FIELD_OCTETS
        if connection.needs_reset:
            connection.protocol.send_reset()
        # Until the upstream has taken the message. RFC 3030 2 wants RSET after a chunk that was refused too.
        connection.needs_reset = True
        connection.protocol.send_envelope(self._mail, recipients, size=octets)


def _refusal(answers: Sequence[Answer]) -> Reply | None:
    """The first refusal of MAIL or a recipient."""
    for verb, reply in answers:
        if reply.code >= 400 and (verb is MAIL or verb is RCPT):
            return reply
    return None
