"""The content of a transaction upstream, and the meaning of the reply.

Small content is sent in one write, large content as fast as the upstream takes it, from memory or from a file.
"""

import logging
from collections.abc import Sequence
from functools import partial
from time import monotonic_ns
from typing import Final

from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.content import Content
from otel_smtp.forwarding.enveloping import Enveloping
from otel_smtp.forwarding.settings import TracePolicy
from otel_smtp.forwarding.verdicts import deciding, fold, outcome_of, wants_another_transaction
from otel_smtp.observing import DeliveryPhase, Outcome
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import ExchangeAnswers
from otel_smtp.smtp.envelope import Body
from otel_smtp.smtp.received import replace_trace_headers
from otel_smtp.smtp.replies import ErrorType, Reply

logger: Final = logging.getLogger("otel_smtp.forwarding.transmitting")

ONE_PIECE_OCTETS: Final = 64 * 1024
"""Content up to this size is joined and sent in one write; joining more costs more than extra writes."""

_TO_BE_REENCODED: Final = replies.NEEDS_8BITMIME.with_text("to be re-encoded")  # never sent to a client

# See `smtp.client.answers` for why such names are here.
_CONTENT_ENDED: Final = DeliveryPhase.CONTENT
_RELAYED: Final = Outcome.RELAYED
_INJECT: Final = TracePolicy.INJECT
_STRIP: Final = TracePolicy.STRIP


class Transmitting(Enveloping):
    """The content; see `Delivery` for arguments and attributes."""

    __slots__ = ()

    def _may_not_go_on(self) -> bool:
        """Whether another gateway may have the message by now, before all content is sent; if so, aborts."""
        has_lost_lease = self._record.has_lost_lease
        return has_lost_lease is not None and not self.has_ended_content and has_lost_lease()

    def _unfit(self) -> Reply | None:
        """Make the outgoing header block; returns why this upstream cannot take the message, or None."""
        content, extensions = self._content, self._connection.protocol.extensions
        if content.original is not None and extensions.eight_bit_mime:
            content = self._content = content.original  # it was made 7-bit for an upstream before this one
        header = content.header
        policy = self._smarthost.settings.trace_context
        if policy is _INJECT:
            carrier = self._relaying.observer.delivery_carrier(self._attempt)
            # Nothing is traced (OTEL_SDK_DISABLED): the client's trace goes on behind us, as through any no-op SDK.
            header = replace_trace_headers(header, carrier or None, self._record.added_octets)
        elif policy is _STRIP and b"trace" in header.lower():
            header = replace_trace_headers(header, {})
        self._header = header
        if not extensions.eight_bit_mime and content.original is None:
            reencodes = self._smarthost.settings.reencode_8bit
            if (reencodes or self._mail.body is Body.EIGHT_BIT_MIME) and content.is_8bit:
                if reencodes:
                    return _TO_BE_REENCODED
                # Promised in good faith: another upstream, or this one later, may take it.
                return replies.UPSTREAM_LACKS_8BITMIME if self._record.is_8bit_offered else replies.NEEDS_8BITMIME
        if not self._is_plain and self._mail.smtputf8 and not extensions.smtputf8:
            is_lacking = content.needs_smtputf8 if extensions.eight_bit_mime else content.is_8bit
            if is_lacking:  # it was offered: otherwise such content would have been refused before
                return replies.UPSTREAM_LACKS_SMTPUTF8
        octets = self._octets = len(header) + content.body_octets
        size = extensions.size
        if size and octets > size:
            return replies.MESSAGE_TOO_BIG
        return None

    def _decline(self, refusal: Reply) -> None:
        """This upstream cannot take the message; permanent if no other one serves it."""
        if refusal is _TO_BE_REENCODED:
            self._content.reencode(partial(self._content_reencoded, self._connection))
        elif self.route or self._tried.faults:
            self._pass_by(refusal)
        else:
            self._conclude(refusal)

    def _content_reencoded(self, connection: UpstreamConnection, made: Content | Reply) -> None:
        """Continue the same work with the re-encoded content."""
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

    # Written -----------------------------------------------------------------------------------------------

    def _ask_for_content(self) -> None:
        self._connection.protocol.send_data()
        self._after = Transmitting._data_answered
        self._connection.exchange(self._settled)

    def _data_answered(self, answers: ExchangeAnswers) -> None:
        self._data_settled(answers[0].reply)

    def _data_settled(self, reply: Reply) -> None:
        pieces = self._content.pieces
        if reply.code >= 400:
            self._conclude(reply)
        elif pieces is None or self._octets > ONE_PIECE_OCTETS:
            self._write_large()
        else:
            protocol = self._connection.protocol
            for piece in (self._header, *pieces):
                protocol.send_content(piece)
            protocol.end_content()
            self._end_content()

    def _write_chunk(self) -> None:
        """Write the content as one last chunk, and wait for its reply."""
        pieces = self._content.pieces
        if pieces is None or self._octets > ONE_PIECE_OCTETS:
            self._write_large()
        else:
            self._connection.protocol.send_last_chunk(self._header, *pieces)
            self._end_content()

    def _end_content(self) -> None:
        """Send what is queued with the end of the content, and wait for the reply to the message."""
        self.has_ended_content = True
        self._attempt.phases.append((monotonic_ns(), _CONTENT_ENDED, None))
        self._after = _MESSAGE_ANSWERED
        self._connection.exchange(self._settled)

    def _write_large(self) -> None:
        protocol = self._connection.protocol
        if protocol.extensions.chunking:
            protocol.begin_last_chunk(self._octets)
        self._sent_octets = self._sent_pieces = 0
        self._after = Transmitting._refused_early
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
        """Write a piece, but hold the last one back; returns whether to continue at once."""
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

    def _refused_early(self, answers: ExchangeAnswers) -> None:
        """The upstream refuses the content before its end, which makes the connection unusable."""
        self._conclude(answers[-1].reply)

    # Answered ----------------------------------------------------------------------------------------------

    def _message_answered(self, answers: ExchangeAnswers) -> None:
        contents = answers.contents
        if answers.refusal is not None:
            self._refused_in_burst(answers)
        elif len(contents) == 1 and (contents[0].code < 400 or not self._connection.protocol.is_lmtp):  # one for all
            self._conclude(self._for_client(contents[0]) if answers.verdicts else contents[0])
        else:
            self._conclude_each([self._for_client(reply) for reply in contents])

    def _refused_in_burst(self, answers: ExchangeAnswers) -> None:
        """MAIL or a recipient was refused, and with it the message."""
        refusal = answers.refusal
        assert refusal is not None
        if answers[0].reply.code >= 400:
            self._check_sender_refusal(refusal)
            self._count_as_refused()
        else:
            if wants_another_transaction(refusal) and not answers.accepted:
                self._check_quota(refusal)
            self._note_refused(answers)
        self._conclude(refusal)

    def _note_refused(self, answers: ExchangeAnswers) -> None:
        """Note the recipients for whose sake a message was refused before its content."""
        for recipient, verdict in zip(self.accepted, answers.verdicts, strict=False):
            if verdict.code >= 400:
                self._attempt.refuse(recipient, self._for_client(verdict), monotonic_ns())

    def _conclude_each(self, verdicts: Sequence[Reply]) -> None:
        """The message has a reply for each recipient."""
        self._conclude(fold(verdicts), verdicts)

    def _conclude(self, reply: Reply, verdicts: Sequence[Reply] = ()) -> None:
        """The message has its reply."""
        if reply.code < 400:
            self._connection.needs_reset = False
            self._end(Outcome.PARTLY_RELAYED if self._attempt.refused else _RELAYED, reply, None, answered=True)
        else:
            reply = self._conclude_refused(reply, verdicts)
        delivered = self._delivered
        if delivered is not None:
            self._delivered = None
            delivered(reply, verdicts)
        else:
            logger.info("message outcome after its client left", extra={**self._named(), "code": reply.code})

    def _conclude_refused(self, reply: Reply, verdicts: Sequence[Reply]) -> Reply:
        """The message was refused, perhaps only for some recipients; returns the reply to the client."""
        attempt = self._attempt
        said = deciding(verdicts) if verdicts else reply  # without a remark of ours
        own = said if said.error_type is ErrorType.UPSTREAM_REFUSED else None
        reply = self._for_client(reply)
        outcome = outcome_of(reply)
        for recipient, verdict in zip(self.accepted, verdicts, strict=False):
            if verdict.code >= 400:
                attempt.accepted_count -= 1
                attempt.refuse(recipient, verdict, monotonic_ns())
            elif outcome is not Outcome.UNKNOWN:
                outcome = Outcome.PARTLY_RELAYED
        self._end(outcome, own, reply.error_type, answered=True)
        return reply


_MESSAGE_ANSWERED: Final = Transmitting._message_answered  # see `enveloping`
