"""The spans of ordinary mail that is queued as octets, in one go, and what the log's lines say of them.

As `ordinary`, for mail that is relayed at once: nearly every transaction ends in the spool with a 250, and nearly every
message leaves it by its first attempt. The two spans are made at different moments, so each has moulds of its own.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from otel_smtp.observing import DeliveryRecord, Outcome, TransactionRecord
from otel_smtp.smtp.replies import Reply
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.ordinary import OrdinaryMail
from otel_smtp.telemetry.otlp import TAGS, Integers, Mould, length, text_head
from otel_smtp.telemetry.propagation import TraceContext
from otel_smtp.telemetry.sampling import Identity
from otel_smtp.telemetry.shapes import (
    AFTER_LAST_EVENT_NS,
    MAX_SHAPES,
    SPAN_PAIRS,
    EncodedSpan,
    Pair,
    encode_link,
    frame_of_link,
    frame_of_span,
)
from otel_smtp.telemetry.span_attributes import SpanAttributes
from otel_smtp.telemetry.span_lines import LineOfSpan, LineShape, ShownDomains, line_shape
from otel_smtp.telemetry.state_events import describe_phases

_NUMBERS: Final = Integers(9, names.TRANSACTION_NUMBER)
_SIZES: Final = Integers(9, names.MESSAGE_SIZE)
_BEFORE_WORDS: Final = tuple(text_head(9, names.REPLY_TEXT, octets) for octets in range(256))
# Looked up in its class, a member costs as much as a call.
_QUEUED: Final = Outcome.QUEUED
_RELAYED: Final = Outcome.RELAYED
_WAIT: Final = SPAN_PAIRS[names.POOL_WAIT, 0.0][:-8]
_NO_DOMAINS: Final = ShownDomains()


class _Mould(NamedTuple):
    """What spans alike have in common, and what the log keeps of them."""

    span: Mould
    line: LineShape


class OrdinarySpooled:
    """Encodes the spans of ordinary mail that is queued.

    Args:
        attributes: says which attributes spans have.
        mail: has the attributes with the domains of senders and recipients.
    """

    __slots__ = ("_attempts", "_attributes", "_has_plain_attributes", "_mail", "_told", "_transactions")

    def __init__(self, attributes: SpanAttributes, mail: OrdinaryMail) -> None:
        self._attributes = attributes
        self._mail = mail
        self._has_plain_attributes = not (attributes.with_message_id or attributes.redaction.shows_mailboxes)
        self._transactions: dict[tuple[object, ...], _Mould] = {}
        self._attempts: dict[tuple[object, ...], _Mould] = {}
        # Of the latest span, what its line has too: its shape, the words of its reply, a transaction's domains.
        self._told: tuple[LineShape, str, ShownDomains, ShownDomains]

    def transaction(self, record: TransactionRecord, identity: Identity) -> EncodedSpan | None:
        """The span of a transaction that ended in the spool; None if something about it is not ordinary.

        Args:
            identity: the transaction's; it is recorded.
        """
        reply, octets, connection, spool_id = record.reply, record.octets, record.connection, record.spool_id
        context, parent = identity.context, identity.parent
        if (
            reply is None
            or octets is None
            or connection is None
            or spool_id is None
            or parent is None
            or identity.attributes
            or not (spool_id.isascii() and spool_id.isalnum())  # it is shown as it is
        ):
            return None
        origin = SPAN_PAIRS[names.CONNECTION_ID, connection.id]
        # What decides whether a transaction is ordinary stands in the key too: only those that are have moulds.
        key = (
            len(origin), reply.code, reply.enhanced, len(record.accepted), record.mail.body, parent.is_remote,
            record.outcome, reply.error_type, len(record.deliveries), record.refused_count, record.deferred_count,
            record.error_type, record.failure, context.trace_state,
        )  # fmt: skip
        mould = self._transactions.get(key)
        if mould is None:
            if not (
                record.outcome is _QUEUED
                and reply.code < 400
                and reply.error_type is None
                and not record.deliveries
                and not record.refused_count
                and not record.deferred_count
                and record.error_type is None
                and record.failure is None
                and not context.trace_state
                and self._has_plain_attributes
            ):
                return None
            shape, _, _ = self._attributes.transaction(record, is_in_application=parent.is_remote)
            span = Mould(*frame_of_span(shape, is_remote=parent.is_remote), f"{len(origin)}s")
            mould = _Mould(span, line_shape(shape))
            _keep(self._transactions, key, mould)
        offset = record.wall_offset_ns
        values: list[bytes | float] = [
            context.trace_id.to_bytes(16, "big"),
            context.span_id.to_bytes(8, "big"),
            parent.span_id.to_bytes(8, "big"),
            record.begun_ns + offset,
            record.ended_ns + offset + AFTER_LAST_EVENT_NS,
            origin,
        ]
        text, words, before_words = self._words(reply)
        sender, recipients = self._mail.domains(record)
        of_all, shape_of_line = mould
        self._told = shape_of_line, text, sender, recipients
        own = [
            _NUMBERS(record.number), _SIZES(octets),
            text_head(9, names.SPOOL_ID, len(spool_id)), spool_id.encode("ascii"),
            sender.octets, recipients.octets, before_words, words,
        ]  # fmt: skip
        if identity.links:
            own += map(encode_link, identity.links)
        rest = b"".join(own)
        return EncodedSpan(b"".join((TAGS[2], length(of_all.size + len(rest)), of_all.fill(values), rest)))

    def line_of_transaction(self, record: TransactionRecord, identity: Identity) -> LineOfSpan:
        """The line's part of the transaction whose span was made last."""
        shape, words, sender, recipients = self._told
        assert record.connection is not None
        assert record.octets is not None
        assert record.spool_id is not None
        pairs: Sequence[Pair] = (
            (names.CONNECTION_ID, record.connection.id),
            (names.TRANSACTION_NUMBER, record.number),
            (names.MESSAGE_SIZE, record.octets),
            (names.SPOOL_ID, record.spool_id),
            *sender.pairs,
            *recipients.pairs,
            (names.REPLY_TEXT, words),
        )
        ended_ns = record.ended_ns + AFTER_LAST_EVENT_NS
        seconds = (ended_ns - record.begun_ns) / 1e9
        return LineOfSpan(shape, pairs, seconds, identity.context, ended_ns + record.wall_offset_ns)

    def attempt(self, delivery: DeliveryRecord, identity: Identity) -> EncodedSpan | None:
        """The span of an attempt at a message of the spool that took all of it; None as above.

        Args:
            identity: the attempt's; it is recorded.
        """
        record, reply, server, peer, tls = (
            delivery.transaction, delivery.reply, delivery.server, delivery.peer, delivery.tls,
        )  # fmt: skip
        wait_ns, spool_id, links = delivery.pool_wait_ns, record.spool_id, identity.links
        context, parent = identity.context, identity.parent
        if (
            record.connection is not None
            or reply is None
            or peer is None
            or wait_ns is None
            or spool_id is None
            or parent is None
            or len(links) != 1
            or links[0].context is not parent
            or identity.attributes
            or not (spool_id.isascii() and spool_id.isalnum())  # it is shown as it is
        ):
            return None
        offset, parents_id = record.wall_offset_ns, parent.span_id.to_bytes(8, "big")
        values: list[bytes | float] = [
            context.trace_id.to_bytes(16, "big"),
            context.span_id.to_bytes(8, "big"),
            parents_id,
            delivery.begun_ns + offset,
            delivery.ended_ns + offset + AFTER_LAST_EVENT_NS,
            spool_id.encode("ascii"),
            wait_ns / 1e9,
        ]
        said: list[object] = []
        for at_ns, phase, answer in delivery.phases:
            values.append(at_ns + offset)
            if answer is None:
                said.append(phase)
            else:
                said += (phase, answer.code, answer.enhanced)
        values += (parent.trace_id.to_bytes(16, "big"), parents_id)
        # As above: what decides whether an attempt is ordinary stands here too.
        key = (
            len(spool_id), record.kind, record.is_possible_duplicate, delivery.upstream,
            server.host, server.port, peer.host, peer.port,
            None if tls is None else (tls.version, tls.cipher, tls.resumed),
            delivery.attempt, delivery.accepted_count, delivery.round_trips, delivery.is_reused,
            reply.code, reply.enhanced, parent.is_remote,
            delivery.outcome, reply.error_type, delivery.error_type, delivery.failure, len(delivery.refused),
            delivery.refused_count, delivery.deferred_count, delivery.paced, record.taken_over,
            context.trace_state, parent.trace_state,
            *said,
        )  # fmt: skip
        mould = self._attempts.get(key)
        if mould is None:
            if not self._is_ordinary(delivery, reply, context, parent):
                return None
            mould = self._mould_of_attempt(delivery, identity, len(spool_id))
            _keep(self._attempts, key, mould)
        text, words, before_words = self._words(reply)
        of_all, shape_of_line = mould
        self._told = shape_of_line, text, _NO_DOMAINS, _NO_DOMAINS
        size = length(of_all.size + len(before_words) + len(words))
        return EncodedSpan(b"".join((TAGS[2], size, of_all.fill(values), before_words, words)))

    def _is_ordinary(self, delivery: DeliveryRecord, reply: Reply, context: TraceContext, parent: TraceContext) -> bool:
        """Whether nothing went wrong in an attempt, and it is one of mail that was not taken over."""
        return (
            delivery.outcome is _RELAYED
            and reply.code < 400
            and reply.error_type is None
            and delivery.error_type is None
            and delivery.failure is None
            and not delivery.refused
            and not delivery.refused_count
            and not delivery.deferred_count
            and delivery.paced is None
            and delivery.transaction.taken_over is None
            and not context.trace_state
            and not parent.trace_state
        )

    def line_of_attempt(self, delivery: DeliveryRecord, identity: Identity) -> LineOfSpan:
        """The line's part of the attempt whose span was made last."""
        shape, words, _, _ = self._told
        record = delivery.transaction
        assert record.spool_id is not None
        pairs: Sequence[Pair] = (names.SPOOL_ID, record.spool_id), (names.REPLY_TEXT, words)
        ended_ns = delivery.ended_ns + AFTER_LAST_EVENT_NS
        seconds = (ended_ns - delivery.begun_ns) / 1e9
        return LineOfSpan(shape, pairs, seconds, identity.context, ended_ns + record.wall_offset_ns)

    def _words(self, reply: Reply) -> tuple[str, bytes, bytes]:
        """A reply's words, as they are shown, as octets, and what stands before these."""
        lines = reply.lines
        text = self._attributes.redaction.text(lines[0] if len(lines) == 1 else reply.text)
        words = text.encode("utf-8", "replace")
        size = len(words)
        return text, words, _BEFORE_WORDS[size] if size < 256 else text_head(9, names.REPLY_TEXT, size)

    def _mould_of_attempt(self, delivery: DeliveryRecord, identity: Identity, id_octets: int) -> _Mould:
        shape, _, _ = self._attributes.delivery(delivery)
        events: list[bytes | str] = []
        for _, event in describe_phases(delivery):
            events += (event.before, "Q", event.octets)
        assert identity.parent is not None
        span = Mould(
            *frame_of_span(shape, is_remote=identity.parent.is_remote),
            text_head(9, names.SPOOL_ID, id_octets), f"{id_octets}s",
            _WAIT, "d", SPAN_PAIRS[names.POOL_REUSED, delivery.is_reused],
            *events,
            *frame_of_link(identity.links[0]),
        )  # fmt: skip
        return _Mould(span, line_shape(shape))


def _keep(moulds: dict[tuple[object, ...], _Mould], key: tuple[object, ...], mould: _Mould) -> None:
    if len(moulds) >= MAX_SHAPES:
        moulds.clear()
    moulds[key] = mould
