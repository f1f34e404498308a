"""One transaction upstream: one mail on its way along the upstreams that serve it, one attempt after the other.

A `Delivery` is told what to do (`ask` about recipients, `send` the content, `burst` all of it), and says by one call
back what came of it. In between it goes on by itself: each step queues commands, begins an exchange on its connection,
and names the step that takes the answers. Here is decided what travels together, when the message is given out of hand,
and which upstream may be tried next.

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
from otel_smtp.forwarding.verdicts import fold, missing_extension, outcome_of
from otel_smtp.observing import DeliveryPhase, DeliveryRecord, Observer, Outcome, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import Answer, Verb
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.errors import RemoteProtocolError
from otel_smtp.smtp.received import replace_trace_headers
from otel_smtp.smtp.replies import ErrorType, Reply

logger: Final = logging.getLogger("otel_smtp.forwarding.delivery")

STALE_AFTER_SECONDS: Final = 5.0
"""A connection that was idle for longer is asked MAIL and RCPT before it is given content: were it dead, which is seen
only then, a message sent in one piece would have an unknown outcome instead of another connection."""
ONE_PIECE_OCTETS: Final = 64 * 1024
"""Content up to this size is joined and sent in one write; joining more costs more than the further writes."""

_MAIL: Final = frozenset({Verb.RSET, Verb.MAIL})
_ENVELOPE: Final = frozenset({Verb.RSET, Verb.MAIL, Verb.RCPT})
_PHASES: Final[dict[Verb | None, DeliveryPhase]] = {
    Verb.MAIL: DeliveryPhase.MAIL,
    Verb.DATA: DeliveryPhase.DATA,
    Verb.CONTENT: DeliveryPhase.REPLY,
}

RecipientsJudged = Callable[[Sequence[Reply]], None]
"""Takes one reply per recipient."""

Delivered = Callable[[Reply, Sequence[Reply]], None]
"""Takes the final reply, and from an LMTP upstream each recipient's own, where there are several."""


class Delivery:
    """One transaction upstream.

    Args:
        record: gets a `DeliveryRecord` for each attempt.
        ended_alone: called when an attempt is over that went on without its client, after `abort`.

    Attributes:
        route: the upstreams that were not tried yet, the preferred one first.
        accepted: recipients that go with the content; those of `ask` are added here as they are accepted.
        has_ended_content: see above.
        is_under_way: an attempt has begun and is not over.
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
        "_is_connected",
        "_is_open",
        "_is_parked",
        "_judged",
        "_mail",
        "_mail_refusal",
        "_observer",
        "_opening",
        "_record",
        "_refusal",
        "_retries_fresh",
        "_retries_same",
        "_sent_octets",
        "_sent_pieces",
        "_smarthost",
        "_ticket",
        "_tried_again",
        "_was_reused",
        "_work",
        "accepted",
        "has_ended_content",
        "is_under_way",
        "route",
    )

    # Of the attempt; they are set when it begins, and when it has got its connection.
    _attempt: DeliveryRecord
    _smarthost: Smarthost
    _connection: UpstreamConnection
    _first_round_trip: int
    _was_reused: bool
    # Of the work; they are set when it is asked for.
    _content: Content
    _header: bytes
    _sent_octets: int
    _sent_pieces: int
    _after: Callable[[list[Answer]], None]
    _work: Callable[[], None]

    def __init__(
        self, mail: Mail, record: TransactionRecord, observer: Observer, ended_alone: "Callable[[Delivery], None]"
    ) -> None:
        self._mail = mail
        self._record = record
        self._observer = observer
        self._ended_alone = ended_alone
        self._is_aborted = False
        # The way.
        self.route: Sequence[Smarthost] = ()
        self._faults: list[UpstreamFault] = []
        self._tried_again: frozenset[Smarthost] = frozenset()
        self._retries_same = False  # the next connection is one to the same upstream, within the same attempt
        self._retries_fresh = False  # and one that was not used before
        self._ticket: Ticket[UpstreamConnection] | None = None
        self._opening: asyncio.Task[None] | None = None
        # The transaction.
        self.is_under_way = False
        self._is_connected = False
        self._is_parked = False  # the client has nothing to say; the connection may be taken away
        self._is_open = False  # the upstream has answered MAIL with 2yz on this connection
        self.has_ended_content = False
        self.accepted: list[Recipient] = []
        self._refusal: Reply | None = None  # the last one, of a recipient or of MAIL
        self._mail_refusal: Reply | None = None
        # What is asked, and who waits for it.
        self._asked: Sequence[Recipient] = ()
        self._judged: RecipientsJudged | None = None
        self._delivered: Delivered | None = None

    # What a transaction asks ------------------------------------------------------------------------------

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
        if not self.is_under_way or self.has_ended_content:
            return
        if self._ticket is not None:
            ticket, self._ticket = self._ticket, None
            ticket.on_decided = None
            self._smarthost.withdraw(ticket)
        if self._opening is not None:
            opening, self._opening = self._opening, None
            opening.cancel()
        refusal = self._refusal
        if refusal is not None and not self.accepted and self._is_connected:
            self._end(outcome_of(refusal), refusal, refusal.error_type, answered=True)
        else:
            self._end(Outcome.ABORTED, None, None)

    def is_served_by(self, smarthosts: Sequence[Smarthost]) -> bool:
        """Whether the upstream that has the transaction now, perhaps not the preferred one, is among `smarthosts`."""
        return not self.is_under_way or self._smarthost in smarthosts

    def give_up(self) -> None:
        """End an attempt that goes on without its client: nobody will know what came of it."""
        if self.is_under_way:
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)

    # Steps and their faults -------------------------------------------------------------------------------

    def _proceed(self) -> None:
        """Do the work, on the connection at hand, else on the next that is available."""
        try:
            if not self._is_connected:
                self._next_attempt()
                return
            if self._is_parked:
                self._is_parked = False
                self._smarthost.unpark(self._connection)
            if not self._connection.is_alive:
                self._connection.ensure_alive()
            self._work()
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _settled(self, answers: list[Answer], fault: UpstreamFault | None) -> None:
        """An exchange is over: note what was answered, and take the next step."""
        try:
            now_ns = monotonic_ns()
            attempt = self._attempt
            for verb, reply in answers:
                if verb is Verb.RCPT:
                    attempt.recipient_phase(now_ns, reply)
                elif verb in _PHASES:
                    attempt.phases.append((now_ns, _PHASES[verb], reply))
            if fault is not None:
                self._cut_short(answers, fault)
                return
            if answers[0][0] is Verb.RSET:
                self._check_reset(answers.pop(0).reply)
            self._after(answers)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _recover(self, error: Exception) -> None:
        """Decide what follows from whatever went wrong in a step. Nothing of it reaches those who called us."""
        while True:  # each turn uses up an upstream, a second chance, or the answer
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

    def _fail_internally(self) -> None:
        if self.has_ended_content:
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)
        else:
            self._end(Outcome.ABORTED, None, ErrorType.INTERNAL)
        self._answer_for_all(replies.INTERNAL)

    def _fail(self, fault: UpstreamFault) -> None:
        """Decide what follows from an attempt without a usable answer."""
        was_connected = self._is_connected
        if self.has_ended_content:
            # The one case that must never be tried again: it may have been delivered.
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)
            logger.error("outcome of a delivery unknown", extra={"upstream": self._attempt.upstream})
            self._answer_for_all(replies.OUTCOME_UNKNOWN if isinstance(fault, ConnectionLost) else fault.reply)
            return
        if (
            was_connected
            and isinstance(fault, ConnectionLost)
            and not isinstance(fault, TimedOut)
            and (self._was_reused or self._is_open)
            and not self._is_aborted
            and self._smarthost not in self._tried_again
        ):
            self._tried_again |= {self._smarthost}
            self._retries_same = self._retries_fresh = True
            self._let_go(answered=False)
            self._next_attempt()
            return
        self._end(Outcome.DEFERRED, fault.upstream_reply, fault.reply.error_type)
        self._faults.append(fault)
        if was_connected and fault.reply is replies.UPSTREAM_PROTOCOL:
            # What it makes of the mail is anybody's guess; the next upstream would be asked behind its back.
            self._answer_for_all(fault.reply)
        elif not self._is_aborted:
            self._next_attempt()

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
            judged([reply] * len(self._asked))
        elif delivered is not None:
            delivered(reply, ())

    # The way along the upstreams --------------------------------------------------------------------------

    def _next_attempt(self) -> None:
        """Get a connection for the next attempt, or once more for this one, and do the work on it."""
        is_fresh = False
        if self._retries_same:
            self._retries_same = False
            is_fresh = self._retries_fresh
        elif self.route:
            smarthost, *self.route = self.route
            deliveries = self._record.deliveries
            self._attempt = DeliveryRecord(
                self._record, smarthost.settings.name, smarthost.endpoint, len(deliveries) + 1, monotonic_ns()
            )
            deliveries.append(self._attempt)
            self._smarthost = smarthost
            self.is_under_way = True
        else:
            self._answer_for_all(self._nobody_left())
            return
        connection = None if is_fresh else self._smarthost.take()
        if connection is not None:
            self._begin(connection, 0)
            return
        ticket = self._ticket = self._smarthost.ask(fresh=is_fresh)
        if ticket.decision is Decision.WAITING:
            ticket.on_decided = partial(self._decided, ticket, monotonic_ns())
        else:
            self._take_decision(ticket, 0)

    def _decided(self, ticket: Ticket[UpstreamConnection], asked_ns: int) -> None:
        try:
            self._take_decision(ticket, monotonic_ns() - asked_ns)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _take_decision(self, ticket: Ticket[UpstreamConnection], wait_ns: int) -> None:
        self._ticket = None
        if ticket.connection is not None:
            ticket.connection.messages += 1
            self._begin(ticket.connection, wait_ns)
            return
        attempt = self._attempt
        attempt.pool_wait_ns = wait_ns
        attempt.is_reused = False
        attempt.phases.append((monotonic_ns(), DeliveryPhase.POOL, None))
        if ticket.decision is Decision.NONE:
            raise NoConnectionFree("no connection is free, or the upstream is in backoff")
        self._opening = self._smarthost.open(self._note_phase, self._opened)

    def _opened(self, connection: UpstreamConnection | None, fault: UpstreamFault | None) -> None:
        self._opening = None
        try:
            if connection is not None:
                self._begin(connection, None)
            elif fault is not None:
                self._fail(fault)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _begin(self, connection: UpstreamConnection, wait_ns: int | None) -> None:
        """Do the work on a connection that has just been got.

        Args:
            wait_ns: for a connection that was used before; None: it was opened for this attempt.
        """
        attempt = self._attempt
        if wait_ns is not None:
            attempt.pool_wait_ns = wait_ns
            attempt.is_reused = True
            attempt.phases.append((monotonic_ns(), DeliveryPhase.POOL, None))
        self._connection = connection
        self._is_connected = True
        self._is_open = False
        self._was_reused = attempt.is_reused
        self._first_round_trip = connection.round_trips if wait_ns is not None else 0
        attempt.peer = connection.stream.peer
        attempt.tls = connection.stream.tls
        refusal = missing_extension(self._mail, connection.protocol.extensions, is_tls=attempt.tls is not None)
        if refusal is not None:
            self._faults.append(Unsuitable("the upstream lacks an extension that the mail needs", refusal))
            self._end(Outcome.REFUSED, None, refusal.error_type)
            self._next_attempt()
            return
        self._work()

    def _nobody_left(self) -> Reply:
        """What the client is told: rather that it may try again than that it may not."""
        faults = self._faults
        tried = [fault for fault in faults if not isinstance(fault, NoConnectionFree)] or faults
        reply = next((fault.reply for fault in reversed(tried) if fault.reply.is_transient), None)
        if reply is not None:
            return reply
        return tried[0].reply if tried else replies.UPSTREAM_UNAVAILABLE

    def _reclaimed(self) -> None:
        """The parked connection is another mail's; ours begins once more when the client says something."""
        self._connection.needs_reset = True
        self._is_connected = self._is_parked = False
        self._retries_same = True
        self._retries_fresh = False

    # The transparent way ----------------------------------------------------------------------------------

    def _put(self) -> None:
        """Put the recipients that are asked about; where an upstream takes over from another, those before as well."""
        protocol = self._connection.protocol
        if not self._is_open:
            self._send_envelope(None)
        for recipient in self._asked:
            protocol.send_recipient(recipient)
        self._after = self._recipients_answered
        self._connection.exchange(self._settled, stop_at=_MAIL)

    def _recipients_answered(self, answers: list[Answer]) -> None:
        if not self._is_open:
            refusal = answers[0].reply
            if refusal.code >= 400:
                self._sender_refused(refusal)
                return
            self._is_open = True
            before = 1 + len(self.accepted)
            if before > 1:
                _check_accepted_before(answers[:before])
            del answers[:before]
        verdicts = []
        for recipient, (_, verdict) in zip(self._asked, answers, strict=True):
            verdicts.append(verdict)
            if verdict.code < 400:
                self.accepted.append(recipient)
            else:
                self._refusal = verdict
        judged, self._judged = self._judged, None
        if judged is not None:
            # The connection is left alone until the client says something: it may be taken away meanwhile.
            self._is_parked = True
            self._smarthost.park(self._connection, self._reclaimed)
            judged(verdicts)

    def _sender_refused(self, refusal: Reply) -> None:
        if self.accepted:
            raise UpstreamFault("a sender that another upstream had accepted is refused")
        self._refusal = self._mail_refusal = refusal
        self._end(outcome_of(refusal), refusal, refusal.error_type, answered=True)
        self._answer_for_all(refusal)

    def _send(self) -> None:
        if not self._is_open:
            # What was accepted elsewhere is put to this upstream before it gets the content.
            self._send_envelope(None)
            self._after = self._reopened
            self._connection.exchange(self._settled, stop_at=_MAIL)
        elif self._is_too_big():
            self._conclude(replies.MESSAGE_TOO_BIG)
        elif self._connection.protocol.extensions.chunking:
            self._write()
        else:
            self._ask_for_content()

    def _reopened(self, answers: list[Answer]) -> None:
        _check_accepted_before(answers)
        self._is_open = True
        self._send()

    # The buffered way -------------------------------------------------------------------------------------

    def _burst(self) -> None:
        if self._is_too_big():
            self._conclude(replies.MESSAGE_TOO_BIG)
            return
        protocol, content = self._connection.protocol, self._content
        extensions = protocol.extensions
        self._send_envelope(len(self._header) + content.body_octets)
        if extensions.chunking and extensions.pipelining and content.pieces is not None and self._may_be_all_in_one():
            protocol.send_last_chunk(self._header, *content.pieces)
            self._end_content()
            return
        if extensions.pipelining and not extensions.chunking:
            protocol.send_data()
        self._after = self._envelope_answered
        self._connection.exchange(self._settled, stop_at=_ENVELOPE)

    def _may_be_all_in_one(self) -> bool:
        is_stale = self._was_reused and self._connection.idle_seconds > STALE_AFTER_SECONDS
        return len(self.accepted) == 1 and not is_stale

    def _envelope_answered(self, answers: list[Answer]) -> None:
        self._is_open = answers[0].reply.is_positive
        last = answers[-1]
        if (refusal := _refusal(answers)) is not None:
            if last.verb is Verb.DATA and last.reply.code < 400:
                self._take_back_data(refusal)
            else:
                self._conclude(refusal)
        elif last.verb is Verb.DATA:
            self._data_answered([last])
        elif self._connection.protocol.extensions.chunking:
            self._write()
        else:
            self._ask_for_content()

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
        self._after = lambda _: self._conclude(refusal)
        self._connection.exchange(self._settled)

    # Content ----------------------------------------------------------------------------------------------

    def _is_too_big(self) -> bool:
        """Make the header block that leaves, and see whether the message exceeds what the upstream takes."""
        header = self._content.header
        policy = self._smarthost.settings.trace_context
        if policy is TracePolicy.INJECT:
            header = replace_trace_headers(header, self._observer.delivery_carrier(self._attempt))
        elif policy is TracePolicy.STRIP and b"trace" in header.lower():
            header = replace_trace_headers(header, {})
        self._header = header
        size = self._connection.protocol.extensions.size
        return size is not None and len(header) + self._content.body_octets > size

    def _ask_for_content(self) -> None:
        self._connection.protocol.send_data()
        self._after = self._data_answered
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
            protocol.send_content(self._header)
            for piece in content.pieces:
                protocol.send_content(piece)
            protocol.end_content()
        self._end_content()

    def _write_large(self, octets: int) -> None:
        protocol = self._connection.protocol
        if protocol.extensions.chunking:
            protocol.begin_last_chunk(octets)
        self._sent_octets = self._sent_pieces = 0
        self._after = self._refused_early
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
            elif self._write_piece(piece):
                self._write_more()
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _refused_early(self, answers: list[Answer]) -> None:
        """The upstream refuses the content before its end; the connection cannot be used again then."""
        self._conclude(answers[-1].reply)

    def _end_content(self) -> None:
        """Send what is queued, the end of the content with it, and wait for the reply to the message."""
        self.has_ended_content = True
        self._attempt.phases.append((monotonic_ns(), DeliveryPhase.CONTENT, None))
        self._after = self._message_answered
        self._connection.exchange(self._settled)

    def _message_answered(self, answers: list[Answer]) -> None:
        if len(answers) == 1:
            self._conclude(answers[0].reply)
            return
        verdicts = [reply for verb, reply in answers if verb is Verb.CONTENT]
        self._conclude(_refusal(answers) or fold(verdicts), verdicts)

    # The end of an attempt --------------------------------------------------------------------------------

    def _conclude(self, reply: Reply, verdicts: Sequence[Reply] = ()) -> None:
        """The message has its reply."""
        if reply.code < 400:
            self._connection.needs_reset = False
        own = reply if reply.error_type in (None, ErrorType.UPSTREAM_REFUSED) else None
        outcome = Outcome.RELAYED if reply.code < 400 else outcome_of(reply)
        self._end(outcome, own, reply.error_type, answered=True)
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
        if not self.is_under_way:
            return
        self.is_under_way = False
        attempt, record = self._attempt, self._record
        if self._is_connected:
            attempt.round_trips = self._connection.round_trips - self._first_round_trip
        attempt.end(outcome, reply, error_type, monotonic_ns())
        if self._is_connected:
            self._let_go(answered=answered)
        if record.ended_ns or record.connection is None:
            self._observer.delivery_ended(attempt)
        if self._is_aborted:
            self._ended_alone(self)

    def _let_go(self, *, answered: bool) -> None:
        connection = self._connection
        self._is_connected = False
        if self._is_parked:
            self._is_parked = False
            self._smarthost.unpark(connection)
        if not connection.is_alive:
            connection.abandon()
        self._smarthost.release(connection, answered=answered)

    # ------------------------------------------------------------------------------------------------------

    def _send_envelope(self, octets: int | None) -> None:
        """Queue MAIL and the recipients that were accepted before."""
        connection = self._connection
        if connection.needs_reset:
            connection.protocol.send_reset()
        # Until the upstream has taken the message. RFC 3030 2 wants RSET after a chunk that was refused too.
        connection.needs_reset = True
        connection.protocol.send_mail(self._mail, size=octets)
        for recipient in self.accepted:
            connection.protocol.send_recipient(recipient)

    def _note_phase(self, phase: DeliveryPhase, reply: Reply | None) -> None:
        self._attempt.phases.append((monotonic_ns(), phase, reply))


def _refusal(answers: Sequence[Answer]) -> Reply | None:
    """The first refusal of MAIL or a recipient."""
    for verb, reply in answers:
        if reply.code >= 400 and (verb is Verb.MAIL or verb is Verb.RCPT):
            return reply
    return None


def _check_accepted_before(answers: Sequence[Answer]) -> None:
    if any(reply.code >= 400 for _, reply in answers):
        raise UpstreamFault("what another upstream had accepted is refused")
