"""One transaction upstream: one mail on its way along the upstreams that serve it, one attempt after the other.

A `Delivery` is told what to do (`ask` about recipients, `send` the content, `burst` all of it), and says by one call
back what came of it. In between it goes on by itself: each step queues commands, begins an exchange on its connection,
and names the step that takes the answers. Here is decided what travels together, when the message is given out of hand,
and who may be tried next.

* MAIL and the first recipients are one group, or all of a small message is.
* `has_ended_content` says that the final dot, or the last chunk, is on its way. From there on nobody else may be tried:
  a lost connection means that nobody knows whether the mail was delivered, and a second try might deliver it twice.
* Before that, an upstream that gives no usable answer makes way for the next one. What was accepted for the client is
  put to that one first, and must be accepted again.
* One connection that dies says little about its upstream. So an upstream that is lost with a kept connection, or in the
  middle of a transaction, is tried once more on a fresh one, before the next in order, and within the same attempt.

A refused recipient in `burst` must refuse the whole. So nothing that ends the content is sent before all are known to be
accepted, but for a single recipient: where that is refused, the last chunk has nobody to go to.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic_ns
from typing import Final

from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.content import Content
from otel_smtp.forwarding.faults import (
    ConnectionLost,
    NoConnectionFree,
    OutOfStep,
    TimedOut,
    Unsuitable,
    UpstreamFault,
)
from otel_smtp.forwarding.pool import Decision, Ticket
from otel_smtp.forwarding.settings import TracePolicy
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.observing import DeliveryPhase, DeliveryRecord, Observer, Outcome, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import Answer, Extensions, Verb
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.errors import RemoteProtocolError
from otel_smtp.smtp.received import replace_trace_headers
from otel_smtp.smtp.replies import ErrorType, Reply

logger: Final = logging.getLogger("otel_smtp.forwarding.delivery")

STALE_AFTER_SECONDS: Final = 5.0
"""A connection that was idle for longer is asked MAIL and RCPT before it is given content: were it dead, which is seen
only then, a message sent in one piece would have an unknown outcome instead of another connection."""
ONE_PIECE_OCTETS: Final = 64 * 1024
"""Content up to this size is joined and sent in one write; joining more costs more than the further writes."""

MOST_FAULTS: Final = 1000  # in one step; each uses up an upstream or a second chance, so this is only a backstop

_MAIL: Final = frozenset({Verb.RSET, Verb.MAIL})
_ENVELOPE: Final = frozenset({Verb.RSET, Verb.MAIL, Verb.RCPT})
_PHASES: Final = {
    Verb.MAIL: DeliveryPhase.MAIL,
    Verb.DATA: DeliveryPhase.DATA,
    Verb.CONTENT: DeliveryPhase.REPLY,
}

RecipientsJudged = Callable[[Sequence[Reply]], None]
"""Takes one reply per recipient."""

Delivered = Callable[[Reply, Sequence[Reply]], None]
"""Takes the final reply, and from an LMTP upstream each recipient's own, where there are several."""


def missing_extension(mail: Mail, extensions: Extensions, *, is_tls: bool) -> Reply | None:
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
    """One transaction upstream.

    Args:
        record: gets a `DeliveryRecord` for each attempt.
        ended_alone: called when an attempt that went on without its client, after `abort`, is over.

    Attributes:
        accepted: recipients that go with the content; those of `ask` are added here as they are accepted.
        smarthost: that of the last attempt; None before the first.
        has_ended_content: see above.
    """

    __slots__ = (
        "_after",
        "_asked",
        "_attempt",
        "_connection",
        "_content",
        "_delivered",
        "_ended_alone",
        "_faults",
        "_first_round_trip",
        "_header",
        "_is_aborted",
        "_is_open",
        "_is_parked",
        "_judged",
        "_mail",
        "_mail_refusal",
        "_observer",
        "_opening",
        "_record",
        "_refusal",
        "_retry_fresh",
        "_retry_same",
        "_route",
        "_sent_octets",
        "_sent_pieces",
        "_ticket",
        "_tried_again",
        "_was_reused",
        "_work",
        "accepted",
        "has_ended_content",
        "smarthost",
    )

    def __init__(
        self, mail: Mail, record: TransactionRecord, observer: Observer, ended_alone: "Callable[[Delivery], None]"
    ) -> None:
        self._mail = mail
        self._record = record
        self._observer = observer
        self._ended_alone = ended_alone
        self.accepted: list[Recipient] = []
        self.has_ended_content = False
        # The way.
        self.smarthost: Smarthost | None = None
        self._route: Sequence[Smarthost] | None = None  # not tried yet; None before it is known
        self._faults: list[UpstreamFault] = []
        self._tried_again: set[Smarthost] | None = None
        self._retry_same = False  # the next connection is one to the same upstream, within the same attempt
        self._retry_fresh = False  # and one that was not used before
        # What is to be done, and who waits for it.
        self._work: Callable[[], None] = self._put
        self._asked: Sequence[Recipient] = ()
        self._judged: RecipientsJudged | None = None
        self._content: Content | None = None
        self._delivered: Delivered | None = None
        self._refusal: Reply | None = None  # the last one, of a recipient or of MAIL
        self._mail_refusal: Reply | None = None
        self._is_aborted = False
        # The attempt.
        self._attempt: DeliveryRecord | None = None
        self._ticket: Ticket[UpstreamConnection] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._connection: UpstreamConnection | None = None
        self._was_reused = False
        self._first_round_trip = 0
        self._is_parked = False  # the client has nothing to say; the connection may be taken away
        self._is_open = False  # the upstream has answered MAIL with 2yz on this connection
        self._after: Callable[[list[Answer]], None] = self._recipients_answered
        self._header = b""
        self._sent_octets = self._sent_pieces = 0  # of the body

    # What a transaction asks ------------------------------------------------------------------------------

    def restrict_route(self, smarthosts: Sequence[Smarthost]) -> None:
        """Set the route, before the first attempt; later, keep to those of it that are among `smarthosts`."""
        if self._route is None:
            self._route = smarthosts
        else:
            self._route = [smarthost for smarthost in self._route if smarthost in smarthosts]

    def ask(self, recipients: Sequence[Recipient], judged: RecipientsJudged) -> None:
        """Put recipients to the upstream, with MAIL before the first ones, in one group.

        `judged` gets one reply each. Where MAIL was refused, its refusal is that of each.
        """
        if self._mail_refusal is not None:
            judged([self._mail_refusal] * len(recipients))
            return
        self._asked = recipients
        self._judged = judged
        self._work = self._put
        self._proceed()

    def send(self, content: Content, delivered: Delivered) -> None:
        """Send the content to the recipients that were accepted."""
        self._content = content
        self._delivered = delivered
        self._work = self._send
        self._proceed()

    def burst(self, content: Content, delivered: Delivered) -> None:
        """Do all of it: one round trip with CHUNKING, for a single recipient and a small message; else two.

        `delivered` gets the reply to the message, or the first refusal on the way: then nobody got anything.
        """
        self._content = content
        self._delivered = delivered
        self._work = self._burst
        self._proceed()

    def abort(self) -> None:
        """Nobody waits for an answer any more. A message that is out of our hands comes to its end for the record."""
        self._is_aborted = True
        self._judged = self._delivered = None
        if self.has_ended_content and self._attempt is not None:
            return
        if self._ticket is not None:
            assert self.smarthost is not None
            ticket, self._ticket = self._ticket, None
            ticket.on_decided = None
            self.smarthost.withdraw(ticket)
        if self._opening is not None:
            opening, self._opening = self._opening, None
            opening.cancel()
        if self._attempt is None:
            return
        refusal = self._refusal if not self.accepted and self._connection is not None else None
        if refusal is not None:
            self._end(_outcome_of(refusal), refusal, refusal.error_type, answered=True)
        else:
            self._end(Outcome.ABORTED, None, None)

    @property
    def is_under_way(self) -> bool:
        """Whether an attempt is not over."""
        return self._attempt is not None

    def give_up(self) -> None:
        """End an attempt that goes on without its client: nobody will know what came of it."""
        if self._attempt is not None:
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)

    # The way along the upstreams --------------------------------------------------------------------------

    def _proceed(self) -> None:
        """Do the work, on the connection at hand, else on the next that is available."""
        try:
            connection = self._connection
            if connection is None:
                self._next_attempt()
                return
            if self._is_parked:
                self._is_parked = False
                assert self.smarthost is not None
                self.smarthost.unpark(connection)
            if not connection.is_alive:
                connection.ensure_alive()
            self._work()
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _recover(self, error: Exception) -> None:
        """Decide what follows from whatever went wrong in a step; it never reaches who called us."""
        for _ in range(MOST_FAULTS):
            try:
                if isinstance(error, UpstreamFault):
                    self._fail(error)
                elif isinstance(error, RemoteProtocolError):  # a late reply was there when a command was to be sent
                    self._fail(OutOfStep(str(error)))
                else:
                    logger.error("delivery attempt failed: internal error", exc_info=error)
                    self._fail_internally()
            except Exception as another:  # noqa: BLE001 - the next attempt failed at once
                error = another
            else:
                return
        logger.error("delivery given up: internal error", exc_info=error)

    def _fail_internally(self) -> None:
        if self.has_ended_content:
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)
        else:
            self._end(Outcome.ABORTED, None, ErrorType.INTERNAL)
        self._answer_for_all(replies.INTERNAL)

    def _next_attempt(self) -> None:
        if self._retry_same:
            self._retry_same = False
            fresh = self._retry_fresh
        elif self._route:
            smarthost, self._route = self._route[0], self._route[1:]
            self.smarthost = smarthost
            self._attempt = DeliveryRecord(
                self._record,
                smarthost.settings.name,
                smarthost.endpoint,
                len(self._record.deliveries) + 1,
                monotonic_ns(),
            )
            self._record.deliveries.append(self._attempt)
            fresh = False
        else:
            self._answer_for_all(self._nobody_left())
            return
        assert self.smarthost is not None
        connection = None if fresh else self.smarthost.take()
        if connection is not None:
            self._use(connection, is_reused=True, wait_ns=0)
            return
        ticket = self._ticket = self.smarthost.ask(fresh=fresh)
        if ticket.decision is Decision.WAITING:
            ticket.on_decided = partial(self._decided, monotonic_ns())
        else:
            self._take_decision(ticket, 0)

    def _decided(self, asked_ns: int) -> None:
        ticket = self._ticket
        if ticket is None:
            return
        try:
            self._take_decision(ticket, monotonic_ns() - asked_ns)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _take_decision(self, ticket: Ticket[UpstreamConnection], wait_ns: int) -> None:
        self._ticket = None
        if ticket.decision is Decision.REUSE:
            assert ticket.connection is not None
            ticket.connection.messages += 1
            self._use(ticket.connection, is_reused=True, wait_ns=wait_ns)
            return
        self._note_pool(is_reused=False, wait_ns=wait_ns)
        if ticket.decision is Decision.NONE:
            raise NoConnectionFree("no connection is free, or the upstream is in backoff")
        assert self.smarthost is not None
        self._opening = self.smarthost.open(self._note_phase, self._opened)

    def _opened(self, connection: UpstreamConnection | None, fault: UpstreamFault | None) -> None:
        self._opening = None
        try:
            if connection is not None:
                self._begin(connection, is_reused=False)
            elif fault is not None:
                self._fail(fault)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _use(self, connection: UpstreamConnection, *, is_reused: bool, wait_ns: int) -> None:
        self._note_pool(is_reused=is_reused, wait_ns=wait_ns)
        self._begin(connection, is_reused=is_reused)

    def _begin(self, connection: UpstreamConnection, *, is_reused: bool) -> None:
        """Do the work on a connection that has just been got."""
        attempt = self._attempt
        assert attempt is not None
        self._connection = connection
        self._was_reused = is_reused
        self._first_round_trip = connection.round_trips if is_reused else 0
        self._is_open = False
        attempt.peer = connection.stream.peer
        attempt.tls = connection.stream.tls
        refusal = missing_extension(self._mail, connection.extensions, is_tls=attempt.tls is not None)
        if refusal is not None:
            self._faults.append(Unsuitable("the upstream lacks an extension that the mail needs", refusal))
            self._end(Outcome.REFUSED, None, refusal.error_type)
            self._next_attempt()
            return
        self._work()

    def _fail(self, fault: UpstreamFault) -> None:
        """Decide what follows from an attempt without a usable answer."""
        smarthost, connection = self.smarthost, self._connection
        assert smarthost is not None
        if self.has_ended_content:
            # The one case that must never be tried again: it may have been delivered.
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)
            logger.error("outcome of a delivery unknown", extra={"upstream": smarthost.settings.name})
            self._answer_for_all(replies.OUTCOME_UNKNOWN if isinstance(fault, ConnectionLost) else fault.reply)
            return
        if self._is_aborted:
            self._end(Outcome.DEFERRED, fault.upstream_reply, fault.reply.error_type)
            return
        if (
            connection is not None
            and isinstance(fault, ConnectionLost)
            and not isinstance(fault, TimedOut)
            and (self._was_reused or self._is_open)
            and (self._tried_again is None or smarthost not in self._tried_again)
        ):
            self._tried_again = {smarthost, *(self._tried_again or ())}
            self._retry_same = self._retry_fresh = True
            self._let_go(connection, answered=False)
            self._next_attempt()
            return
        self._end(Outcome.DEFERRED, fault.upstream_reply, fault.reply.error_type)
        self._faults.append(fault)
        if fault.reply is replies.UPSTREAM_PROTOCOL and connection is not None:
            # What it makes of the mail is anybody's guess; whoever comes next would be asked behind its back.
            self._answer_for_all(fault.reply)
            return
        self._next_attempt()

    def _nobody_left(self) -> Reply:
        """What the client is told: rather that it may try again than that it may not."""
        faults = self._faults
        tried = [fault for fault in faults if not isinstance(fault, NoConnectionFree)] or faults
        reply = next((fault.reply for fault in reversed(tried) if fault.reply.is_transient), None)
        if reply is not None:
            return reply
        return tried[0].reply if tried else replies.UPSTREAM_UNAVAILABLE

    def _answer_for_all(self, reply: Reply) -> None:
        """Tell who waits that it came to nothing."""
        judged, self._judged = self._judged, None
        delivered, self._delivered = self._delivered, None
        if judged is not None:
            judged([reply] * len(self._asked))
        elif delivered is not None:
            delivered(reply, ())

    def _reclaimed(self) -> None:
        """The parked connection is another mail's; ours begins once more when the client says something."""
        connection = self._connection
        assert connection is not None
        connection.needs_reset = True
        self._connection = None
        self._is_parked = False
        self._retry_same = True
        self._retry_fresh = False

    # Exchanges --------------------------------------------------------------------------------------------

    def _exchange(self, after: Callable[[list[Answer]], None], stop_at: frozenset[Verb] = frozenset()) -> None:
        """Send what is queued; `after` takes the answers. The last thing that a step does."""
        assert self._connection is not None
        self._after = after
        self._connection.exchange(self._settled, stop_at=stop_at)

    def _settled(self, answers: list[Answer], fault: UpstreamFault | None) -> None:
        try:
            self._take_answers(answers, fault)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _take_answers(self, answers: list[Answer], fault: UpstreamFault | None) -> None:
        attempt = self._attempt
        assert attempt is not None
        now_ns = monotonic_ns()
        for verb, reply in answers:
            if verb is Verb.RCPT:
                attempt.recipient_phase(now_ns, reply)
            elif verb in _PHASES:
                attempt.phases.append((now_ns, _PHASES[verb], reply))
        if fault is not None:
            self._cut_short(answers, fault)
            return
        if answers and answers[0].verb is Verb.RSET:
            if answers[0].reply.code >= 400:
                # What it keeps of the transaction before is anybody's guess.
                assert self._connection is not None
                self._connection.close()
                raise OutOfStep("RSET refused")
            del answers[0]
        self._after(answers)

    def _cut_short(self, answers: list[Answer], fault: UpstreamFault) -> None:
        """The answers ended early; what is known of the message all the same counts."""
        if self.has_ended_content:
            verdicts = [reply for verb, reply in answers if verb is Verb.CONTENT]
            if answers and answers[-1].reply.code == 421:
                # LMTP: some recipients may have got it before.
                if any(verdict.is_positive for verdict in verdicts):
                    self._conclude(replies.SOME_RECIPIENTS_REFUSED, verdicts)
                    return
                self.has_ended_content = False
            elif (refusal := _refusal(answers)) is not None:
                # The only recipient was refused: whatever came of the content, nobody got it.
                self._conclude(refusal, verdicts)
                return
        raise fault

    # The transparent way ----------------------------------------------------------------------------------

    def _put(self) -> None:
        """Put the recipients that are asked about; where an upstream takes over from another, those before as well."""
        assert self._connection is not None
        protocol = self._connection.protocol
        if not self._is_open:
            self._send_mail(None)
            for recipient in self.accepted:
                protocol.send_recipient(recipient)
        for recipient in self._asked:
            protocol.send_recipient(recipient)
        self._exchange(self._recipients_answered, _MAIL)

    def _recipients_answered(self, answers: list[Answer]) -> None:
        verdicts = [reply for verb, reply in answers if verb is Verb.RCPT]
        if not self._is_open:
            refusal = answers[0].reply
            if refusal.code >= 400:
                self._sender_refused(refusal)
                return
            self._is_open = True
            if before := len(self.accepted):
                self._check_accepted_before(verdicts[:before])
                del verdicts[:before]
        for recipient, verdict in zip(self._asked, verdicts, strict=True):
            if verdict.code < 400:
                self.accepted.append(recipient)
            else:
                self._refusal = verdict
        judged, self._judged = self._judged, None
        if judged is None:
            return
        self._park()
        judged(verdicts)

    def _sender_refused(self, refusal: Reply) -> None:
        self._check_accepted_before([refusal] * len(self.accepted))
        self._refusal = self._mail_refusal = refusal
        self._end(_outcome_of(refusal), refusal, refusal.error_type, answered=True)
        self._answer_for_all(refusal)

    @staticmethod
    def _check_accepted_before(verdicts: Sequence[Reply]) -> None:
        if any(verdict.code >= 400 for verdict in verdicts):
            raise UpstreamFault("recipients that another upstream had accepted are refused")

    def _park(self) -> None:
        """Leave the connection alone until the client says something: it may be taken away meanwhile."""
        assert self._connection is not None
        assert self.smarthost is not None
        self._is_parked = True
        self.smarthost.park(self._connection, self._reclaimed)

    def _send(self) -> None:
        assert self._connection is not None
        if not self._is_open:
            self._reopen()
            return
        if self._is_too_big():
            self._conclude(replies.MESSAGE_TOO_BIG)
        elif self._connection.extensions.chunking:
            self._write()
        else:
            self._ask_for_content()

    def _reopen(self) -> None:
        """Put what was accepted elsewhere to this upstream, before it gets the content."""
        self._asked = ()
        self._send_mail(None)
        assert self._connection is not None
        for recipient in self.accepted:
            self._connection.protocol.send_recipient(recipient)
        self._exchange(self._reopened, _MAIL)

    def _reopened(self, answers: list[Answer]) -> None:
        self._check_accepted_before([reply for _, reply in answers])
        self._is_open = True
        self._send()

    def _ask_for_content(self) -> None:
        assert self._connection is not None
        self._connection.protocol.send_data()
        self._exchange(self._data_answered)

    def _data_answered(self, answers: list[Answer]) -> None:
        reply = answers[0].reply
        if reply.code >= 400:
            self._conclude(reply)
        else:
            self._write()

    # The buffered way -------------------------------------------------------------------------------------

    def _burst(self) -> None:
        connection, content = self._connection, self._content
        assert connection is not None
        assert content is not None
        if self._is_too_big():
            self._conclude(replies.MESSAGE_TOO_BIG)
            return
        protocol, extensions = connection.protocol, connection.extensions
        self._send_mail(len(self._header) + content.body_octets)
        for recipient in self.accepted:
            protocol.send_recipient(recipient)
        if len(self.accepted) == 1 and content.pieces_in_memory is not None and self._takes_all_in_one():
            protocol.send_last_chunk(self._header, *content.pieces_in_memory)
            self._end_content()
            return
        if extensions.pipelining and not extensions.chunking:
            protocol.send_data()
        self._exchange(self._envelope_answered, _ENVELOPE)

    def _takes_all_in_one(self) -> bool:
        connection = self._connection
        assert connection is not None
        may_be_stale = self._was_reused and connection.idle_seconds > STALE_AFTER_SECONDS
        return connection.extensions.chunking and connection.extensions.pipelining and not may_be_stale

    def _envelope_answered(self, answers: list[Answer]) -> None:
        assert self._connection is not None
        self._is_open = answers[0].reply.is_positive
        last = answers[-1]
        if (refusal := _refusal(answers)) is not None:
            if last.verb is Verb.DATA and last.reply.code < 400:
                self._take_back_data(refusal)
            else:
                self._conclude(refusal)
        elif last.verb is Verb.DATA:
            self._data_answered([last])
        elif self._connection.extensions.chunking:
            self._write()
        else:
            self._ask_for_content()

    def _take_back_data(self, refusal: Reply) -> None:
        """Get out of a DATA that was answered with 354 although the message must not be sent."""
        assert self._connection is not None
        if self._connection.protocol.accepted_recipients:
            # A lone dot would deliver an empty message to those that were accepted. Only the end of the connection
            # takes DATA back.
            self._connection.close()
            self._conclude(refusal)
            return
        # RFC 2920 3.1: "the client cannot assume that the DATA command will be rejected just because none of the RCPT
        # TO commands worked"; then a lone dot ends it, and nobody is there to get the empty message.
        self._connection.protocol.end_content()
        self._exchange(lambda _: self._conclude(refusal))

    # Content ----------------------------------------------------------------------------------------------

    def _is_too_big(self) -> bool:
        """Make the header block, and see whether the message exceeds what the upstream takes."""
        connection, content = self._connection, self._content
        assert connection is not None
        assert content is not None
        self._header = self._relayed_header(content.header)
        size = connection.extensions.size
        return size is not None and len(self._header) + content.body_octets > size

    def _relayed_header(self, header: bytes) -> bytes:
        assert self.smarthost is not None
        assert self._attempt is not None
        match self.smarthost.settings.trace_context:
            case TracePolicy.STRIP:
                return replace_trace_headers(header, {})
            case TracePolicy.INJECT:
                return replace_trace_headers(header, self._observer.delivery_carrier(self._attempt))
            case TracePolicy.KEEP:
                return header

    def _write(self) -> None:
        """Write the content with its end, a small message in one piece, and wait for the reply to it."""
        connection, content = self._connection, self._content
        assert connection is not None
        assert content is not None
        protocol, chunking = connection.protocol, connection.extensions.chunking
        body = content.pieces_in_memory
        octets = len(self._header) + content.body_octets
        if body is None or octets > ONE_PIECE_OCTETS:
            if chunking:
                protocol.begin_last_chunk(octets)
            self._put_content(self._header)
            self._sent_octets = self._sent_pieces = 0
            self._after = self._refused_early
            if connection.send_content(self._settled, self._writable):
                self._write_more()
        elif chunking:
            protocol.send_last_chunk(self._header, *body)
            self._end_content()
        else:
            protocol.send_content(self._header)
            for piece in body:
                protocol.send_content(piece)
            protocol.end_content()
            self._end_content()

    def _put_content(self, piece: bytes) -> None:
        assert self._connection is not None
        protocol = self._connection.protocol
        if self._connection.extensions.chunking:
            protocol.send_chunk_octets(piece)
        else:
            protocol.send_content(piece)

    def _writable(self) -> None:
        try:
            self._write_more()
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _write_more(self) -> None:
        """Write the rest of the body, as fast as the upstream takes it; the last piece leaves with the end."""
        connection, content = self._connection, self._content
        assert connection is not None
        assert content is not None
        pieces = content.pieces_in_memory
        while self._sent_octets < content.body_octets:
            if pieces is None:
                content.read(self._sent_octets, partial(self._piece_read, connection))
                return
            self._sent_pieces += 1
            if not self._write_piece(pieces[self._sent_pieces - 1]):
                return
        if not connection.extensions.chunking:
            connection.protocol.end_content()
        self._end_content()

    def _write_piece(self, piece: bytes) -> bool:
        """Write a piece, but keep the last one back; whether to go on at once."""
        connection, content = self._connection, self._content
        assert connection is not None
        assert content is not None
        self._put_content(piece)
        self._sent_octets += len(piece)
        return self._sent_octets >= content.body_octets or connection.send_content(self._settled, self._writable)

    def _piece_read(self, connection: UpstreamConnection, piece: bytes | None) -> None:
        if connection is not self._connection:
            return  # lost meanwhile
        try:
            if piece is None:
                self._end(Outcome.ABORTED, None, None)
                self._answer_for_all(replies.STORAGE_FAILED)
            elif self._write_piece(piece):
                self._write_more()
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _refused_early(self, answers: list[Answer]) -> None:
        """The upstream refuses the content before its end; the connection cannot be used again then."""
        self._conclude(answers[-1].reply)

    def _end_content(self) -> None:
        """Send what is queued, the end of the content with it, and wait for the reply to the message."""
        assert self._attempt is not None
        self.has_ended_content = True
        self._attempt.phases.append((monotonic_ns(), DeliveryPhase.CONTENT, None))
        self._exchange(self._message_answered)

    def _message_answered(self, answers: list[Answer]) -> None:
        verdicts = [reply for verb, reply in answers if verb is Verb.CONTENT]
        self._conclude(_refusal(answers) or _fold(verdicts), verdicts)

    # The end of an attempt --------------------------------------------------------------------------------

    def _conclude(self, reply: Reply, verdicts: Sequence[Reply] = ()) -> None:
        """The message has its reply."""
        assert self._connection is not None
        if reply.code < 400:
            self._connection.needs_reset = False
        own = reply if reply.error_type in (None, ErrorType.UPSTREAM_REFUSED) else None
        self._end(_outcome_of(reply), own, reply.error_type, answered=True)
        delivered, self._delivered = self._delivered, None
        if delivered is not None:
            delivered(reply, verdicts if len(verdicts) > 1 else ())
        else:
            logger.info("outcome of a message whose client is gone", extra={"code": reply.code})

    def _end(
        self, outcome: Outcome, reply: Reply | None, error_type: ErrorType | None, *, answered: bool = False
    ) -> None:
        """The attempt is over: complete its record, and give the connection back. Idempotent.

        Args:
            reply: the upstream's own.
            answered: the upstream is well.
        """
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        connection = self._connection
        if connection is not None:
            attempt.round_trips = connection.round_trips - self._first_round_trip
        attempt.end(outcome, reply, error_type, monotonic_ns())
        if connection is not None:
            self._let_go(connection, answered=answered)
        record = self._record
        if record.ended_ns or record.connection is None:
            self._observer.delivery_ended(attempt)
        if self._is_aborted:
            self._ended_alone(self)

    def _let_go(self, connection: UpstreamConnection, *, answered: bool) -> None:
        assert self.smarthost is not None
        self._connection = None
        if self._is_parked:
            self._is_parked = False
            self.smarthost.unpark(connection)
        if not connection.is_alive:
            connection.abandon()
        self.smarthost.release(connection, answered=answered)

    # ------------------------------------------------------------------------------------------------------

    def _send_mail(self, octets: int | None) -> None:
        connection = self._connection
        assert connection is not None
        if connection.needs_reset:
            connection.protocol.send_reset()
        # Until the upstream has taken the message. RFC 3030 2 wants RSET after a chunk that was refused too.
        connection.needs_reset = True
        connection.protocol.send_mail(self._mail, size=octets)

    def _note_pool(self, *, is_reused: bool, wait_ns: int) -> None:
        attempt = self._attempt
        assert attempt is not None
        attempt.pool_wait_ns = wait_ns
        attempt.is_reused = is_reused
        attempt.phases.append((monotonic_ns(), DeliveryPhase.POOL, None))

    def _note_phase(self, phase: DeliveryPhase, reply: Reply | None) -> None:
        if self._attempt is not None:
            self._attempt.phases.append((monotonic_ns(), phase, reply))


def _outcome_of(reply: Reply) -> Outcome:
    if reply.code < 400:
        return Outcome.RELAYED
    return Outcome.DEFERRED if reply.code < 500 else Outcome.REFUSED


def _refusal(answers: Sequence[Answer]) -> Reply | None:
    """The first refusal of MAIL or a recipient."""
    for verb, reply in answers:
        if reply.code >= 400 and (verb is Verb.MAIL or verb is Verb.RCPT):
            return reply
    return None


def _fold(verdicts: Sequence[Reply]) -> Reply:
    """One reply for what LMTP answers once for each recipient.

    All accepted: the first. All refused: one that lets the client try again, if there is one. Some of both: 4yz, so
    that the client keeps the mail. Those who have it already get it twice, and nobody loses it.
    """
    if len(verdicts) == 1:
        return verdicts[0]
    refusals = [reply for reply in verdicts if reply.code >= 400]
    if not refusals:
        return verdicts[0]
    if len(refusals) < len(verdicts):
        return replies.SOME_RECIPIENTS_REFUSED
    return next((reply for reply in refusals if reply.is_transient), refusals[0])
