"""Both spans of an ordinary mail as octets, in one go, and what the log's lines say of them.

Theory of operation
-------------------
Nearly every mail is relayed by its first attempt to all of its recipients, and then nearly all of what its two spans
say has been said before. So there is a `Mould` for mails alike: the octets of all that they have in common, of the
shapes of both spans (`shapes`), of the events of the attempt's phases, and of what stands between times. It is found by
everything that these depend on; what is left for each mail are ids, times, sizes, domains and the upstream's words.

A mould is made of what the general encoder uses (`SpanAttributes`, `describe_phases`), and a mail that is not ordinary
in any respect is left to that: `OrdinaryMail.spans` says None. A test holds both encodings against one another.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from otel_smtp.observing import ConnectionRecord, DeliveryRecord, Outcome, TransactionRecord
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.otlp import LENGTHS, TAGS, Mould, field, key_value, length, text_head, varint
from otel_smtp.telemetry.sampling import Identity, SegmentIdentity
from otel_smtp.telemetry.shapes import (
    AFTER_LAST_EVENT_NS,
    MAX_SHAPES,
    SPAN_PAIRS,
    EncodedPair,
    encode_link,
    frame_of_span,
)
from otel_smtp.telemetry.span_attributes import SpanAttributes
from otel_smtp.telemetry.span_lines import LineShape, LinesOfMail, ShownDomains, line_shape, lines_of_mail
from otel_smtp.telemetry.state_events import describe_phases

MAX_DOMAINS_KEPT: Final = 1024

_SPAN: Final = TAGS[2]
_RELAYED: Final = Outcome.RELAYED  # looked up in its class, a member costs as much as a call
_WAIT: Final = SPAN_PAIRS[names.POOL_WAIT, 0.0][:-8]


class _Kind(NamedTuple):
    """What mails alike have in common.

    Attributes:
        mould: of both spans up to the domains, which stand at the end: with gaps for ids, times, the wait for a
            connection, the upstream's words, the length of the second span, origin, number and size.
        octets: of the second span in it.
        lines: what the log keeps of both.
    """

    mould: Mould
    octets: int
    lines: tuple[LineShape, LineShape]


class OrdinaryMail:
    """Encodes the spans of ordinary mails.

    Args:
        attributes: says which attributes spans have.
        settle_delivery: settles the identity of an attempt: gives the id of its span, where all else follows from its
            transaction's.
    """

    __slots__ = (
        "_attributes",
        "_has_plain_attributes",
        "_kinds",
        "_recipients",
        "_senders",
        "_settle_delivery",
        "_shown_text",
        "_told",
    )

    def __init__(
        self,
        attributes: SpanAttributes,
        settle_delivery: Callable[[DeliveryRecord, TransactionRecord], Identity | int],
    ) -> None:
        self._attributes = attributes
        self._shown_text = attributes.redaction.text
        self._settle_delivery = settle_delivery
        self._has_plain_attributes = not (attributes.with_message_id or attributes.redaction.shows_mailboxes)
        # Of the latest mail, what its lines have too: shapes, the upstream's words, domains; ids of trace and spans.
        self._told: tuple[tuple[LineShape, LineShape], str, ShownDomains, ShownDomains, Sequence[bytes | float]]
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        # By the domain as it was written, with its @: the attributes of one sender, and of one recipient.
        self._senders: dict[str, ShownDomains] = {}
        self._recipients: dict[str, ShownDomains] = {}

    def spans(self, record: TransactionRecord, identity: Identity) -> EncodedPair | None:
        """The spans of the attempt and of the transaction; None if something about them is not ordinary.

        Args:
            identity: the transaction's; it is recorded.
        """
        deliveries = record.deliveries
        if len(deliveries) != 1 or record.outcome is not _RELAYED:
            return None
        delivery = deliveries[0]
        reply, told, peer, tls = delivery.reply, record.reply, delivery.peer, delivery.tls
        wait_ns, octets, connection, parent = delivery.pool_wait_ns, record.octets, record.connection, identity.parent
        if (
            reply is None
            or told is None
            or peer is None
            or wait_ns is None
            or octets is None
            or connection is None
            or parent is None
            or identity.attributes
            or not delivery.ended_ns
        ):
            return None
        attempt_number = delivery.trace or self._settle_delivery(delivery, record)
        if attempt_number.__class__ is not int:
            return None
        server, number, offset = delivery.server, record.number, record.wall_offset_ns
        _, span_number, _, _, state = identity.context
        segment: SegmentIdentity = connection.trace
        trace_id, parent_id, origin = segment.octets or _octets_of(segment, connection)
        if parent is not segment.context:
            trace_id, parent_id = parent.trace_id.to_bytes(16, "big"), parent.span_id.to_bytes(8, "big")
        number_octets = LENGTHS[number] if number < 2048 else varint(number)
        size_octets = LENGTHS[octets] if octets < 2048 else varint(octets)
        lines = reply.lines
        text = self._shown_text(lines[0] if len(lines) == 1 else reply.text)
        words = text.encode("utf-8", "replace")
        # All that decides whether a mail is ordinary stands in the key too: a kind exists only for mails that are.
        said: list[object] = []
        fixed = (
            len(words), len(origin), len(number_octets), len(size_octets), delivery.upstream,
            server.host, server.port, peer.host, peer.port,
            None if tls is None else (tls.version, tls.cipher, tls.resumed),
            delivery.attempt, delivery.accepted_count, delivery.round_trips, delivery.is_reused,
            reply.code, reply.enhanced, reply.error_type, told.code, told.enhanced, told.error_type,
            len(record.accepted), record.mail.body, parent.is_remote, state,
        )  # fmt: skip
        trouble = (
            delivery.outcome, delivery.error_type, record.error_type, delivery.failure, record.failure,
            delivery.refused_count, delivery.deferred_count, record.refused_count, record.deferred_count,
            delivery.paced, record.kind, record.spool_id, record.is_possible_duplicate, record.taken_over,
        )  # fmt: skip
        values: list[bytes | float] = [
            trace_id,
            attempt_number.to_bytes(8, "big"),
            span_number.to_bytes(8, "big"),
            delivery.begun_ns + offset,
            delivery.ended_ns + offset + AFTER_LAST_EVENT_NS,
            wait_ns / 1e9,
        ]
        for at_ns, phase, answer in delivery.phases:
            values.append(at_ns + offset)
            if answer is None:
                said.append(phase)
            else:
                said += (phase, answer.code, answer.enhanced)
        key = (fixed, trouble, *said)
        kind = self._kinds.get(key)
        if kind is None:
            if not self._is_ordinary(record, delivery, identity):
                return None
            kind = self._make(record, delivery, (words, origin, number_octets, size_octets), is_remote=parent.is_remote)
            if len(self._kinds) >= MAX_SHAPES:
                self._kinds.clear()
            self._kinds[key] = kind
        mould, second_octets, shapes = kind

        sender, recipients = self.domains(record)
        own, others, links = sender.octets, recipients.octets, b""
        if identity.links:
            links = b"".join(map(encode_link, identity.links))
        second_octets += len(own) + len(others) + len(links)
        values += (
            words,
            # Its length has two octets, seven bits in each.
            second_octets & 0x7F | 0x80 | second_octets >> 7 << 8,
            trace_id,
            values[2],
            parent_id,
            record.begun_ns + offset,
            record.ended_ns + offset + AFTER_LAST_EVENT_NS,
            origin,
            number_octets,
            size_octets,
        )
        self._told = shapes, text, sender, recipients, values
        return EncodedPair(b"".join((mould.fill(values), own, others, links)))

    def _is_ordinary(self, record: TransactionRecord, delivery: DeliveryRecord, identity: Identity) -> bool:
        """The checks that give the same result for all mails of a kind: nothing failed or was unusual."""
        reply, told = delivery.reply, record.reply
        return (
            reply is not None
            and told is not None
            and delivery.outcome is _RELAYED
            and reply.code < 400
            and told.code < 400
            and reply.error_type is None
            and told.error_type is None
            and delivery.error_type is None
            and record.error_type is None
            and delivery.failure is None
            and record.failure is None
            and not delivery.refused_count
            and not delivery.deferred_count
            and not record.refused_count
            and not record.deferred_count
            and delivery.paced is None
            and record.spool_id is None
            and not record.is_possible_duplicate
            and record.taken_over is None
            and not identity.context.trace_state
            and self._has_plain_attributes
        )

    def lines(self, record: TransactionRecord, identity: Identity) -> LinesOfMail:
        """The lines' part of the ordinary mail whose `spans` were made last."""
        shapes, text, sender, recipients, values = self._told
        delivery, connection = record.deliveries[0], record.connection
        assert connection is not None
        assert record.octets is not None
        delivered_ns, ended_ns = delivery.ended_ns + AFTER_LAST_EVENT_NS, record.ended_ns + AFTER_LAST_EVENT_NS
        offset = record.wall_offset_ns
        return lines_of_mail(
            (
                shapes,
                connection.id,
                text,
                record.number,
                record.octets,
                sender,
                recipients,
                ((delivered_ns - delivery.begun_ns) / 1e9, (ended_ns - record.begun_ns) / 1e9),
                *values[:3],
                identity.context.flags,
                (delivered_ns + offset, ended_ns + offset),
            )
        )

    def domains(self, record: TransactionRecord) -> tuple[ShownDomains, ShownDomains]:
        """The attributes with the domains of sender and recipients."""
        path, accepted = record.mail.reverse_path, record.accepted
        domain = path[path.rfind("@") :]  # of a path without one, its last character: all these share one entry
        sender = self._senders.get(domain)
        if sender is None:
            sender = self._sender(path)
            _keep(self._senders, domain, sender)
        if len(accepted) != 1:
            return sender, self._recipient_domains(record)
        path = accepted[0].address
        domain = path[path.rfind("@") :]
        recipient = self._recipients.get(domain)
        if recipient is None:
            recipient = self._recipient_domains(record)
            _keep(self._recipients, domain, recipient)
        return sender, recipient

    def _sender(self, path: str) -> ShownDomains:
        domain = self._attributes.redaction.domain(path)
        return ShownDomains() if domain is None else ShownDomains((names.MAIL_FROM_DOMAIN, domain))

    def _recipient_domains(self, record: TransactionRecord) -> ShownDomains:
        domains = self._attributes.redaction.domains(record.accepted)
        if len(domains) == 1:
            return ShownDomains((names.RCPT_DOMAINS, domains), (names.RCPT_DOMAIN, domains[0]))
        return ShownDomains((names.RCPT_DOMAINS, domains)) if domains else ShownDomains()

    def _make(
        self,
        record: TransactionRecord,
        delivery: DeliveryRecord,
        gaps: tuple[bytes, bytes, bytes, bytes],
        *,
        is_remote: bool,
    ) -> _Kind:
        """The kind of a mail.

        Args:
            gaps: the upstream's words, the attribute that names the connection, and the values of number and size.
        """
        events: list[bytes | str] = []
        for _, shape in describe_phases(delivery):
            events += (shape.before, "Q", shape.octets)
        of_attempt, _, _ = self._attributes.delivery(delivery)
        of_transaction, _, _ = self._attributes.transaction(record, is_in_application=is_remote)
        words, origin, number, size = (f"{len(gap)}s" for gap in gaps)
        first = (
            *frame_of_span(of_attempt, is_remote=False),
            *(_WAIT, "d", SPAN_PAIRS[names.POOL_REUSED, delivery.is_reused]),
            *events,
            *(text_head(9, names.REPLY_TEXT, len(gaps[0])), words),
        )
        second = (
            *frame_of_span(of_transaction, is_remote=is_remote),
            origin,
            *(_before(names.TRANSACTION_NUMBER, gaps[2]), number),
            *(_before(names.MESSAGE_SIZE, gaps[3]), size),
        )
        return _Kind(
            Mould(_SPAN, length(Mould(*first).size), *first, _SPAN, "H", *second),
            Mould(*second).size,
            (line_shape(of_attempt), line_shape(of_transaction)),
        )


def _before(name: str, value: bytes) -> bytes:
    """The octets before the value of an integer attribute whose value has `octets` octets."""
    return field(9, key_value(name, 1 << 7 * (len(value) - 1)))[: -len(value)]


def _octets_of(segment: SegmentIdentity, connection: ConnectionRecord) -> tuple[bytes, bytes, bytes]:
    """What the spans of all mails of a segment have in common."""
    context = segment.context
    segment.octets = octets = (
        context.trace_id.to_bytes(16, "big"),
        context.span_id.to_bytes(8, "big"),
        SPAN_PAIRS[names.CONNECTION_ID, connection.id],
    )
    return octets


def _keep(kept: dict[str, ShownDomains], written: str, shown: ShownDomains) -> None:
    if len(kept) >= MAX_DOMAINS_KEPT:
        kept.clear()
    kept[written] = shown
