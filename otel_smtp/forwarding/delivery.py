"""One transaction upstream: the dialogue on a connection for one mail.

A `Delivery` takes orders (`ask` about recipients, `send` the content, `burst` all of it), and reports the result of
each by one callback. In between it proceeds by itself: each step queues commands, begins an exchange on its connection,
and names the step that takes the answers. Faults go to `attempts`, which finds the next connection; there the
recipients already accepted for the client come first, and must be accepted again.

* MAIL and the first recipients are one group, or all of a small message is.
* `has_ended_content` says that the final dot, or the last chunk, is on its way.

In `burst` a refused recipient must refuse the whole message. So the end of the content is not sent before all are known
to be accepted, except for a single recipient: if it is refused, the last chunk has no recipient.
"""

import logging
from collections.abc import Mapping, Sequence
from time import monotonic_ns
from typing import Final

from otel_smtp.forwarding.base import MessageAnswered, RecipientsAnswered
from otel_smtp.forwarding.connecting import NOTHING_TRIED, Relaying
from otel_smtp.forwarding.content import Content
from otel_smtp.forwarding.faults import ConnectionLost, OutOfStep, UpstreamFault
from otel_smtp.forwarding.pace import WaitingMail
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.forwarding.transmitting import Transmitting
from otel_smtp.forwarding.verdicts import is_about_credentials, outcome_of, wants_another_transaction
from otel_smtp.observing import DeliveryPhase, Outcome, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import CONTENT, DATA, MAIL, RCPT, RSET, Awaited, ExchangeAnswers
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply

logger: Final = logging.getLogger("otel_smtp.forwarding.delivery")

STALE_AFTER_SECONDS: Final = 5.0
"""On a connection that was idle for longer, MAIL and RCPT are sent before the content: if it is dead, which shows only
then, a message sent in one piece would have an unknown outcome instead of another connection.
"""
BURST_OCTETS: Final = 256 * 1024
"""A message up to this size may be sent with its envelope: if the connection is lost midway, its outcome is unknown."""

_MAIL: Final = frozenset({RSET, MAIL})
_ENVELOPE: Final = frozenset({RSET, MAIL, RCPT})
_RCPT: Final = DeliveryPhase.RCPT
_PHASES: Final[Mapping[Awaited | None, DeliveryPhase]] = {
    MAIL: DeliveryPhase.MAIL,
    RCPT: _RCPT,
    DATA: DeliveryPhase.DATA,
    CONTENT: DeliveryPhase.REPLY,
}


class Delivery(Transmitting):
    """One transaction upstream.

    Args:
        is_plain: the mail's parameters, apart from its size, need no extension.

    Attributes:
        accepted: recipients of the content; `ask` adds those that are accepted.
        left: recipients promised to a further transaction. `wants_fresh`: it needs an unused connection, as they may
            have met the limit of the connection.
    """

    __slots__ = ()

    def __init__(
        self,
        mail: Mail,
        record: TransactionRecord,
        relaying: Relaying,
        route: Sequence[Smarthost],
        is_plain: bool,
    ) -> None:
        # The base class that uses an attribute describes it, from `Connecting` on. They are all set here, because a
        # chain of constructors costs more per mail than the assignments.
        self._mail = mail
        self._record = record
        self._relaying = relaying
        self.route = route
        self._is_plain = is_plain
        self.begins_fresh = self.wants_fresh = self.waits_for_limits = False
        self.is_under_way = self._is_connected = self._is_open = self._is_full = False
        self.has_ended_content = self._is_aborted = False
        self.accepted, self.left, self._promised = [], [], None
        self._tried = NOTHING_TRIED
        self._judged = self._delivered = self._refusal = self._mail_refusal = None
        self._permission = self._more = None
        self._ticket = self._retry = self._since = None

    # Orders of a transaction -------------------------------------------------------------------------------

    def ask(self, recipients: Sequence[Recipient], judged: RecipientsAnswered) -> None:
        """Ask the upstream about recipients, with MAIL before the first ones, in one group.

        `judged` gets one reply each. If MAIL is refused, its refusal applies to each.
        """
        if self._is_full:
            refusal = self._mail_refusal
            judged([self._promise(recipient) if refusal is None else refusal for recipient in recipients])
            return
        self._asked = recipients
        self._judged = judged
        self._work = _PUT_RECIPIENTS
        if self.is_under_way and (pace := self._smarthost.pace) is not None and pace.counts_recipients:
            left = self._smarthost.most_recipients - len(self.accepted)
            more = self._more = pace.ask(
                max(0, min(left, len(recipients))), self._patience_seconds(), self._more_decided, with_message=False
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

    def send(self, content: Content, delivered: MessageAnswered) -> None:
        """Send the content to the accepted recipients."""
        self._content = content
        self._delivered = delivered
        self._work = _SEND
        self._proceed()

    def burst(self, content: Content, delivered: MessageAnswered) -> None:
        """Do the whole transaction: in one round trip with CHUNKING, a single recipient and a small message; otherwise
        in two.

        `delivered` gets the reply to the message, or the first refusal, in which case no recipient got anything.
        """
        self._content = content
        self._delivered = delivered
        self._work = _BURST
        self._proceed()

    def abort(self) -> None:
        """Stop waiting for an answer. The outcome of a completely sent message is still awaited for the record."""
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

    # Answers -------------------------------------------------------------------------------------------------------

    def _settled(self, answers: ExchangeAnswers, fault: UpstreamFault | None) -> None:
        """An exchange is over: note the answers, and take the next step."""
        try:
            now_ns = monotonic_ns()
            attempt = self._attempt
            phases = attempt.phases
            for verb, reply in answers.steps:
                if verb is RCPT and phases[-1][1] is _RCPT:
                    attempt.recipient_phase(now_ns, reply)
                else:
                    phases.append((now_ns, _PHASES[verb], reply))
            attempt.accepted_count += answers.accepted
            if fault is not None:
                if isinstance(fault, OutOfStep) and fault.upstream_reply is not None:
                    # A nonsensical reply to the command that was next.
                    verb = self._connection.protocol.awaited[0]
                    if verb is not RSET:
                        phases.append((now_ns, _PHASES[verb], fault.upstream_reply))
                self._cut_short(answers, fault)
                return
            if answers.begins_with_reset:
                self._check_reset(answers[0].reply)
                answers = ExchangeAnswers(answers[1:])
            # The answer may have taken long, with this process stopped meanwhile.
            if self._record.has_lost_lease is not None and self._may_not_go_on():
                return
            self._after(self, answers)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _cut_short(self, answers: ExchangeAnswers, fault: UpstreamFault) -> None:
        """The answers ended early; those about the message still count."""
        if answers and answers[-1].reply.code == 421:
            answers = ExchangeAnswers(answers[:-1])
            said_goodbye = True
        else:
            said_goodbye = False
        if not isinstance(fault, ConnectionLost):
            if self.has_ended_content and answers.refusal is not None:
                self._conclude(answers.refusal)
                return
            raise fault
        if answers.begins_with_reset:
            answers = ExchangeAnswers(answers[1:])
        if answers.contents:
            # LMTP: these are known. The others are unknown, or have not got it, as 421 says.
            verdicts = [self._for_client(verdict) for verdict in answers.contents]
            rest = fault.quoted_reply if said_goodbye else replies.OUTCOME_UNKNOWN
            verdicts += [rest] * (len(self.accepted) - len(verdicts))
            self._conclude_each(verdicts)
            return
        if self._delivered is not None and answers.refusal is not None and self._work is _BURST:
            # Whatever follows, the message is refused, and no recipient got it.
            self._refused_in_burst(answers)
            return
        if self._work is _PUT_RECIPIENTS and not self._is_open and answers:
            if answers[0].reply.code >= 400:
                self._sender_refused(answers[0].reply)
                return
            self._keep_refusals(answers[1 + len(self.accepted) :])
        elif self._work is _PUT_RECIPIENTS:
            self._keep_refusals(answers)
        if said_goodbye:
            self.has_ended_content = False
        raise fault

    def _check_reset(self, reply: Reply) -> None:
        if reply.code >= 400:
            # The connection's state after the previous transaction is unknown.
            self._connection.close()
            raise OutOfStep("RSET refused")

    # The envelope first, then the content -------------------------------------------------------------

    def _send(self) -> None:
        if not self._is_open:
            # This upstream is asked about recipients accepted elsewhere before it gets the content.
            self._send_envelope(None, self._fitting())
            self._after = Delivery._reopened
            self._connection.exchange(self._settled, stop_at=_MAIL)
        elif (refusal := self._unfit()) is not None:
            self._decline(refusal)
        elif self._connection.protocol.extensions.chunking and not self._may_have_hung_up():
            self._write_chunk()
        else:
            self._ask_for_content()

    def _may_have_hung_up(self) -> bool:
        """Whether the upstream refused a recipient, and perhaps closed the connection behind that, as some do.

        A chunk that is lost with it has an unknown outcome, and may not be sent again; a DATA without a reply may.
        """
        return self._refusal is not None and self._mail.body is not Body.BINARY_MIME

    def _reopened(self, answers: ExchangeAnswers) -> None:
        refusal = answers[0].reply
        if refusal.code >= 400:
            self._check_sender_refusal(refusal)
            raise UpstreamFault("what another upstream had accepted is refused", upstream_reply=refusal)
        self._check_accepted_before(answers.verdicts)
        self._is_open = True
        self._send()

    # All at once -------------------------------------------------------------------------------------------

    def _burst(self) -> None:
        if self._record.has_lost_lease is not None and self._may_not_go_on():
            return
        if (refusal := self._unfit()) is not None:
            self._decline(refusal)
            return
        protocol, content = self._connection.protocol, self._content
        extensions = protocol.extensions
        self._send_envelope(self._octets, self._fitting())
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

    def _envelope_answered(self, answers: ExchangeAnswers) -> None:
        self._is_open = answers[0].reply.is_positive
        last = answers[-1]
        if (refusal := answers.refusal) is not None and not self._is_divided(answers.verdicts):
            if last.verb is DATA and last.reply.code < 400:
                self._note_refused(answers)
                self._take_back_data(refusal)
            else:
                self._refused_in_burst(answers)
        elif last.verb is DATA:
            self._data_settled(last.reply)
        elif self._connection.protocol.extensions.chunking:
            self._write_chunk()
        else:
            self._ask_for_content()

    def _is_divided(self, verdicts: Sequence[Reply]) -> bool:
        """Whether recipients were refused only for being too many: these are left for later."""
        beyond = {number for number, verdict in enumerate(verdicts) if verdict.code >= 400}
        if not (0 < len(beyond) < len(verdicts) and all(wants_another_transaction(verdicts[one]) for one in beyond)):
            return False
        self._note_limit()
        # Without PIPELINING the upstream was not asked about recipients after the first refusal.
        self._leave({*beyond, *range(len(verdicts), len(self.accepted))})
        return True

    def _take_back_data(self, refusal: Reply) -> None:
        """Cancel a DATA that was answered with 354 although the message must not be sent."""
        protocol = self._connection.protocol
        if protocol.accepted_recipients:
            # A lone dot would deliver an empty message to the accepted recipients. Only closing the connection cancels
            # DATA.
            self._connection.close()
            self._conclude(refusal)
            return
        # RFC 2920 3.1: "the client cannot assume that the DATA command will be rejected just because none of the RCPT
        # TO commands worked"; then a lone dot ends it, and there is no recipient to get the empty message.
        protocol.end_content()
        self._refusal = refusal
        self._after = Delivery._data_taken_back
        self._connection.exchange(self._settled)

    def _data_taken_back(self, _: ExchangeAnswers) -> None:
        if self._refusal is not None:
            self._conclude(self._refusal)


# As in `enveloping`.
_PUT_RECIPIENTS: Final = Delivery.put_recipients
_SEND: Final = Delivery._send
_BURST: Final = Delivery._burst
