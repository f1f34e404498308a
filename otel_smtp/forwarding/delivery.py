"""One delivery attempt: one mail on one connection of one upstream, from MAIL to the reply to its content.

Here is decided what travels together, and when the message is given out of hand:

* MAIL and the first recipients are one group (`ask`), or all of a small message is (`burst`);
* `has_ended_content` says that the final dot, or the last chunk, is on its way. From there on nobody else may be tried:
  a lost connection means that nobody knows whether the mail was delivered.

A refused recipient in `burst` must refuse the whole. So nothing that ends the content is sent before all are known to
be accepted, but for a single recipient: where that is refused, the last chunk has nobody to go to.
"""

from collections.abc import Callable, Sequence
from typing import Final

from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.content import Content
from otel_smtp.forwarding.faults import OutOfStep, Reclaimed, Unsuitable, UpstreamFault
from otel_smtp.forwarding.settings import TracePolicy
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.observing import DeliveryObserver, DeliveryPhase, Outcome
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import Answer, Extensions, Verb
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.received import replace_trace_headers
from otel_smtp.smtp.replies import ErrorType, Reply

STALE_AFTER_SECONDS: Final = 5.0
"""A connection that was idle for longer is asked MAIL and RCPT before it is given content: were it dead, which is seen
only then, a message sent in one piece would have an unknown outcome instead of another connection."""

_MAIL: Final = frozenset({Verb.RSET, Verb.MAIL})
_ENVELOPE: Final = frozenset({Verb.RSET, Verb.MAIL, Verb.RCPT})
_PHASES: Final = {
    Verb.MAIL: DeliveryPhase.MAIL,
    Verb.RCPT: DeliveryPhase.RCPT,
    Verb.DATA: DeliveryPhase.DATA,
    Verb.CONTENT: DeliveryPhase.REPLY,
}


def lacking(mail: Mail, extensions: Extensions, *, is_tls: bool) -> Reply | None:
    """The refusal of a mail that needs what an upstream does not offer; None if it offers all.

    DSN parameters are not needed: they are left out where they are not offered (RFC 3461 5.2.2 lets a relay do so).
    """
    if (mail.smtputf8 or not mail.reverse_path.isascii()) and not extensions.smtputf8:
        return replies.NEEDS_SMTPUTF8
    if mail.body is Body.BINARY_MIME and not extensions.binary_mime:
        return replies.NEEDS_BINARYMIME
    if mail.body is Body.EIGHT_BIT_MIME and not extensions.eight_bit_mime:
        return replies.NEEDS_8BITMIME
    # "When the MAIL FROM return-path is empty, the REQUIRETLS parameter SHOULD NOT cause a bounce message to be
    # discarded" (RFC 8689 5): it is asked for where it is offered.
    if mail.require_tls and mail.reverse_path and not (extensions.require_tls and is_tls):
        return replies.REQUIRETLS_UNSUPPORTED
    if mail.size is not None and extensions.size is not None and mail.size > extensions.size:
        return replies.MESSAGE_TOO_BIG
    return None


class Delivery:
    """One attempt. It is over when `end` was called, which gives its connection back.

    Attributes:
        smarthost: where it goes.
        was_reused: its connection had served another mail before.
        is_open: the upstream has answered MAIL with 2yz on this connection.
        has_ended_content: see above.
        verdicts: the replies to the content, one for each recipient where the upstream speaks LMTP.
    """

    __slots__ = (
        "_answers",
        "_connection",
        "_first_round_trip",
        "_has_begun",
        "_is_over",
        "_is_parked",
        "_is_reclaimed",
        "_mail",
        "_seen",
        "_was_taken",
        "has_ended_content",
        "is_open",
        "smarthost",
        "verdicts",
        "was_reused",
    )

    def __init__(
        self,
        smarthost: Smarthost,
        connection: UpstreamConnection,
        mail: Mail,
        seen: DeliveryObserver,
        *,
        was_reused: bool,
    ) -> None:
        self.smarthost = smarthost
        self.was_reused = was_reused
        self.is_open = False
        self.has_ended_content = False
        self.verdicts: Sequence[Reply] = ()
        self._connection = connection
        self._mail = mail
        self._seen = seen
        self._first_round_trip = connection.round_trips if was_reused else 0
        self._answers: list[Answer] = []  # of the exchange that is under way
        self._is_over = False
        self._is_parked = False  # the client has nothing to say; the connection may be taken away
        self._is_reclaimed = False  # it was: it is another mail's now
        self._has_begun = False  # MAIL was sent
        self._was_taken = False  # the upstream said 2yz to the message

    def check(self) -> None:
        """See whether this connection can carry the mail.

        Raises:
            Unsuitable: it cannot.
        """
        extensions = self._connection.extensions
        refusal = lacking(self._mail, extensions, is_tls=self._connection.stream.tls is not None)
        if refusal is not None:
            raise Unsuitable("the upstream lacks an extension that the mail needs", refusal)

    def park(self) -> None:
        """Leave the connection alone until the client says something: it may be taken away meanwhile."""
        if not self._is_over:
            self._is_parked = True
            self.smarthost.park(self._connection, self._give_up_connection)

    def _give_up_connection(self) -> None:
        self._is_parked = False
        self._is_reclaimed = True
        self._connection.needs_reset = True

    def _go_on(self) -> None:
        """Take the connection up again, and look at it.

        Raises:
            Reclaimed: it is another mail's.
            UpstreamFault: it cannot be used.
        """
        if self._is_parked:
            self._is_parked = False
            self.smarthost.unpark(self._connection)
        if self._is_reclaimed:
            raise Reclaimed("the connection was needed more elsewhere")
        self._connection.ensure_alive()

    # The transparent way ----------------------------------------------------------------------------------

    async def ask(self, recipients: Sequence[Recipient]) -> list[Reply]:
        """Put recipients to the upstream, with MAIL before the first ones, in one group.

        Returns:
            One reply each. Where MAIL was refused, its refusal is that of each; `is_open` stays false.

        Raises:
            UpstreamFault: no usable answer.
        """
        protocol = self._connection.protocol
        self._go_on()
        if not self.is_open:
            self._begin(None)
        for recipient in recipients:
            protocol.send_recipient(recipient)
        answers = await self._settle(_MAIL)
        refusal = next(
            (answer.reply for answer in answers if answer.verb is Verb.MAIL and answer.reply.code >= 400), None
        )
        if refusal is not None:
            return [refusal] * len(recipients)
        self.is_open = True
        return [answer.reply for answer in answers if answer.verb is Verb.RCPT]

    async def send(self, content: Content) -> Reply:
        """Send the content to the recipients that were accepted, and wait for the message's reply.

        Raises:
            UpstreamFault: no usable answer; see `has_ended_content`.
        """
        self._go_on()
        header = self._header(content)
        if self._is_too_big(len(header) + content.body_octets):
            return replies.MESSAGE_TOO_BIG
        if not self._connection.extensions.chunking:
            self._connection.protocol.send_data()
            refusal = (await self._settle())[0].reply
            if refusal.code >= 400:
                return refusal
        return await self._write(header, content)

    # The buffered way -------------------------------------------------------------------------------------

    async def burst(self, recipients: Sequence[Recipient], content: Content) -> Reply:
        """Do all of it: one round trip with CHUNKING, for a single recipient and a small message; else two.

        Returns:
            The reply to the message, or the first refusal on the way: then nobody got anything.

        Raises:
            UpstreamFault: no usable answer; see `has_ended_content`.
        """
        connection = self._connection
        protocol, extensions = connection.protocol, connection.extensions
        header = self._header(content)
        octets = len(header) + content.body_octets
        if self._is_too_big(octets):
            return replies.MESSAGE_TOO_BIG
        self._go_on()
        self._begin(octets)
        for recipient in recipients:
            protocol.send_recipient(recipient)
        if len(recipients) == 1 and content.is_in_memory and self._takes_all_in_one():
            protocol.send_last_chunk(header + content.body_in_memory())
            self.has_ended_content = True
            connection.flush()
            self._seen.phase(DeliveryPhase.CONTENT)
            return await self.outcome()
        if extensions.pipelining and not extensions.chunking:
            protocol.send_data()
        answers = await self._settle(_ENVELOPE)
        self.is_open = answers[0].reply.is_positive
        if (refusal := _refusal(answers)) is not None:
            await self._take_back_data(answers)
            return refusal
        if answers[-1].verb is Verb.DATA and answers[-1].reply.code >= 400:
            return answers[-1].reply
        if not extensions.pipelining and not extensions.chunking:
            protocol.send_data()
            answer = (await self._settle())[0]
            if answer.reply.code >= 400:
                return answer.reply
        return await self._write(header, content)

    async def _take_back_data(self, answers: Sequence[Answer]) -> None:
        """Get out of a DATA that was answered with 354 although the message must not be sent."""
        if answers[-1].verb is not Verb.DATA or answers[-1].reply.code >= 400:
            return
        if self._connection.protocol.accepted_recipients:
            # A lone dot would deliver an empty message to those that were accepted. Only the end of the connection
            # takes DATA back.
            self._connection.close()
            return
        # RFC 2920 3.1: "the client cannot assume that the DATA command will be rejected just because none of the RCPT
        # TO commands worked"; then a lone dot ends it, and nobody is there to get the empty message.
        self._connection.protocol.end_content()
        await self._settle()

    # Content ----------------------------------------------------------------------------------------------

    def _header(self, content: Content) -> bytes:
        match self.smarthost.settings.trace_context:
            case TracePolicy.INJECT:
                return replace_trace_headers(content.header, self._seen.carrier())
            case TracePolicy.STRIP:
                return replace_trace_headers(content.header, {})
            case TracePolicy.KEEP:
                return content.header

    async def _write(self, header: bytes, content: Content) -> Reply:
        """Write the content with its end, a small message in one piece, and wait for the reply to it."""
        protocol = self._connection.protocol
        put: Callable[[bytes], None] = protocol.send_content
        if self._connection.extensions.chunking:
            protocol.begin_last_chunk(len(header) + content.body_octets)
            put = protocol.send_chunk_octets
        put(header)
        if content.is_in_memory:
            put(content.body_in_memory())
        else:
            # The piece before is written when there is another one: the last one leaves together with the end.
            async for piece in content.body():
                await self._connection.write_content()
                if (refusal := self._early_refusal()) is not None:
                    return refusal
                put(piece)
        if not self._connection.extensions.chunking:
            protocol.end_content()
        self.has_ended_content = True
        self._connection.flush()
        self._seen.phase(DeliveryPhase.CONTENT)
        return await self.outcome()

    def _early_refusal(self) -> Reply | None:
        """What the upstream says of the content before its end: only a refusal makes sense there.

        The connection cannot be used again then: it is in the midst of the content.
        """
        answer = self._connection.take_answer()
        if answer is None:
            return None
        self._seen.phase(DeliveryPhase.REPLY, answer.reply)
        return answer.reply

    async def outcome(self) -> Reply:
        """The reply to a message whose content has been ended; may be called again after it was cut short.

        Raises:
            ConnectionLost: by a 421 that says that the message was not taken: `has_ended_content` is false again.
            UpstreamFault: nobody knows.
        """
        try:
            await self._connection.settle(answers=self._answers)
        except UpstreamFault as fault:
            return self._outcome_of_fault(fault)
        self._tell_phases()
        answers = self._take_answers()
        self._check_reset(answers)
        self.verdicts = [reply for verb, reply in answers if verb is Verb.CONTENT]
        reply = _refusal(answers) or _fold(self.verdicts)
        self._was_taken = reply.is_positive
        return reply

    def _outcome_of_fault(self, fault: UpstreamFault) -> Reply:
        """What is known of a message all the same, when the answers ended early."""
        self._tell_phases()
        answers = self._take_answers()
        if answers and answers[-1].reply.code == 421:
            # LMTP: some recipients may have got it before.
            self.verdicts = [reply for verb, reply in answers if verb is Verb.CONTENT]
            if any(verdict.is_positive for verdict in self.verdicts):
                return replies.SOME_RECIPIENTS_REFUSED
            self.has_ended_content = False
            raise fault
        if (refusal := _refusal(answers)) is not None:
            return refusal  # the only recipient was refused: whatever came of the content, nobody got it
        raise fault

    # ------------------------------------------------------------------------------------------------------

    def end(
        self, outcome: Outcome, reply: Reply | None, *, error_type: ErrorType | None = None, answered: bool = False
    ) -> None:
        """The attempt is over: tell so, and give the connection back. Idempotent.

        Args:
            reply: the upstream's own.
            answered: the upstream is well.
        """
        if self._is_over:
            return
        self._is_over = True
        round_trips = self._connection.round_trips - self._first_round_trip
        self._release(answered=answered)
        self._seen.ended(outcome, reply, round_trips=0 if self._is_reclaimed else round_trips, error_type=error_type)

    def hand_over(self) -> DeliveryObserver:
        """Be over without saying so: the observer goes to the attempt on a fresh connection that takes its place."""
        self._is_over = True
        self._release(answered=False)
        return self._seen

    def _release(self, *, answered: bool) -> None:
        if self._is_reclaimed:
            return
        if self._is_parked:
            self.smarthost.unpark(self._connection)
        if self._has_begun:
            # RFC 3030 2 wants RSET after a chunk that was refused too.
            self._connection.needs_reset = not self._was_taken
        self.smarthost.release(self._connection, answered=answered)

    def _begin(self, octets: int | None) -> None:
        protocol = self._connection.protocol
        if self._connection.needs_reset:
            protocol.send_reset()
        self._has_begun = True
        protocol.send_mail(self._mail, size=octets)

    async def _settle(self, stop_at: frozenset[Verb] = frozenset()) -> list[Answer]:
        try:
            await self._connection.settle(stop_at=stop_at, answers=self._answers)
        finally:
            self._tell_phases()
            answers = self._take_answers()
        self._check_reset(answers)
        return [answer for answer in answers if answer.verb is not Verb.RSET]

    def _check_reset(self, answers: Sequence[Answer]) -> None:
        if answers and answers[0].verb is Verb.RSET and answers[0].reply.code >= 400:
            # What it keeps of the transaction before is anybody's guess.
            self._connection.close()
            raise OutOfStep("RSET refused")

    def _tell_phases(self) -> None:
        for verb, reply in self._answers:
            if verb in _PHASES:
                self._seen.phase(_PHASES[verb], reply)

    def _take_answers(self) -> list[Answer]:
        answers, self._answers = self._answers, []
        return answers

    def _is_too_big(self, octets: int) -> bool:
        size = self._connection.extensions.size
        return size is not None and octets > size

    def _takes_all_in_one(self) -> bool:
        extensions = self._connection.extensions
        may_be_stale = self.was_reused and self._connection.idle_seconds > STALE_AFTER_SECONDS
        return extensions.chunking and extensions.pipelining and not may_be_stale


def _refusal(answers: Sequence[Answer]) -> Reply | None:
    """The first refusal of MAIL or a recipient."""
    return next((reply for verb, reply in answers if verb in (Verb.MAIL, Verb.RCPT) and reply.code >= 400), None)


def _fold(verdicts: Sequence[Reply]) -> Reply:
    """One reply for what LMTP answers once for each recipient.

    All accepted: the first. All refused: one that lets the client try again, if there is one. Some of both: 4yz, so
    that the client keeps the mail. Those who have it already get it twice, and nobody loses it (P3).
    """
    refusals = [reply for reply in verdicts if reply.code >= 400]
    if not refusals:
        return verdicts[0]
    if len(refusals) < len(verdicts):
        return replies.SOME_RECIPIENTS_REFUSED
    return next((reply for reply in refusals if reply.is_transient), refusals[0])
