"""Both spans of an ordinary mail as octets, in one go, and what the log's lines say of them.

Theory of operation
-------------------
Nearly every mail is relayed by its first attempt to all of its recipients, and then nearly all of what its two spans
say has been said before. So a `_Mould` holds, for mails alike, the octets of all that they have in common: of the
shapes of both spans (`shapes`), of the events of the attempt's phases, and what stands between times. It is found by
everything that these depend on; what is left for each mail are ids, times, sizes, domains and the upstream's words.

A mould is made of what the general encoder uses (`SpanAttributes`, `describe_phases`), and a mail that is not ordinary
in any respect is left to that: `OrdinaryMail.spans` says None. A test holds both encodings against one another.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from otel_smtp.observing import DeliveryRecord, Outcome, TransactionRecord
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.otlp import TAGS, Integers, Mould, length, text_head
from otel_smtp.telemetry.sampling import Identity
from otel_smtp.telemetry.shapes import (
    AFTER_LAST_EVENT_NS,
    MAX_SHAPES,
    SPAN_PAIRS,
    EncodedSpan,
    encode_link,
    frame_of_span,
)
from otel_smtp.telemetry.span_attributes import SpanAttributes
from otel_smtp.telemetry.span_lines import LineShape, LinesOfMail, ShownDomains, line_shape
from otel_smtp.telemetry.state_events import describe_phases

MAX_DOMAINS_KEPT: Final = 1024

_NUMBERS: Final = Integers(9, names.TRANSACTION_NUMBER)
_SIZES: Final = Integers(9, names.MESSAGE_SIZE)
_RELAYED: Final = Outcome.RELAYED  # looked up in its class, a member costs as much as a call
_BEFORE_WORDS: Final = tuple(text_head(9, names.REPLY_TEXT, octets) for octets in range(256))
_WAIT: Final = SPAN_PAIRS[names.POOL_WAIT, 0.0][:-8]


class _Moulds(NamedTuple):
    """What mails alike have in common: of the attempt's span all but the reply, with gaps for ids and times, for the
    wait for a connection, and for the times of its phases; of the transaction's span its shape, with gaps for ids,
    times and origin; and what the log keeps of both."""

    delivery: Mould
    transaction: Mould
    lines: tuple[LineShape, LineShape]


class OrdinaryMail:
    """Encodes the spans of ordinary mails.

    Args:
        attributes: says which attributes spans have.
        settle_delivery: gives an attempt of a transaction its identity.
    """

    __slots__ = (
        "_attributes",
        "_has_plain_attributes",
        "_moulds",
        "_recipients",
        "_senders",
        "_settle_delivery",
        "_told",
    )

    def __init__(
        self, attributes: SpanAttributes, settle_delivery: Callable[[DeliveryRecord, TransactionRecord], Identity]
    ) -> None:
        self._attributes = attributes
        self._settle_delivery = settle_delivery
        self._has_plain_attributes = not (attributes.with_message_id or attributes.redaction.shows_mailboxes)
        # Of the latest mail, what its lines have too: their shapes, the upstream's words, the domains.
        self._told: tuple[tuple[LineShape, LineShape], str, ShownDomains, ShownDomains]
        self._moulds: dict[tuple[object, ...], _Moulds] = {}
        # By the domain as it was written: the attributes of one sender, and of one recipient.
        self._senders: dict[str, ShownDomains] = {}
        self._recipients: dict[str, ShownDomains] = {}

    def spans(self, record: TransactionRecord, identity: Identity) -> tuple[EncodedSpan, EncodedSpan] | None:
        """The spans of the attempt and of the transaction; None where something about them is not ordinary.

        Args:
            identity: the transaction's; it is recorded.
        """
        deliveries = record.deliveries
        if len(deliveries) != 1 or record.outcome is not _RELAYED:
            return None
        delivery = deliveries[0]
        attempt: Identity = delivery.trace or self._settle_delivery(delivery, record)
        reply, told, peer, tls = delivery.reply, record.reply, delivery.peer, delivery.tls
        wait_ns, octets, connection, parent = delivery.pool_wait_ns, record.octets, record.connection, identity.parent
        context = identity.context
        trace_number, span_number, flags, _, state = context
        _, attempt_number, attempt_flags, _, attempt_state = attempt.context
        if (
            reply is None
            or told is None
            or peer is None
            or wait_ns is None
            or octets is None
            or connection is None
            or parent is None
            or delivery.outcome is not _RELAYED
            or attempt.parent is not context
            or not attempt.is_recording
            or attempt.attributes
            or attempt.links
            or attempt_state
            or attempt_flags != flags
            or identity.attributes
            or state
            or reply.code >= 400
            or told.code >= 400
            or reply.error_type is not None
            or told.error_type is not None
            or delivery.error_type is not None
            or record.error_type is not None
            or delivery.failure is not None
            or record.failure is not None
            or delivery.refused
            or record.refused
            or delivery.refused_count
            or delivery.deferred_count
            or record.refused_count
            or record.deferred_count
            or delivery.paced is not None
            or record.spool_id is not None
            or record.is_possible_duplicate
            or record.taken_over is not None
            or not delivery.ended_ns
            or not self._has_plain_attributes
        ):
            return None
        server, upstream, accepted = delivery.server, delivery.upstream, record.accepted
        offset = record.wall_offset_ns
        trace_id = trace_number.to_bytes(16, "big")
        span_id = span_number.to_bytes(8, "big")
        origin = SPAN_PAIRS[names.CONNECTION_ID, connection.info.id]
        alike: list[object] = [
            len(origin),
            upstream,
            server.host,
            server.port,
            peer.host,
            peer.port,
            None if tls is None else (tls.version, tls.cipher, tls.resumed),
            delivery.attempt,
            delivery.accepted_count,
            delivery.round_trips,
            delivery.is_reused,
            reply.code,
            reply.enhanced,
            told.code,
            told.enhanced,
            len(accepted),
            record.mail.body,
            record.kind,
            parent.is_remote,
        ]
        values: list[bytes | float] = [
            trace_id,
            attempt_number.to_bytes(8, "big"),
            span_id,
            delivery.begun_ns + offset,
            delivery.ended_ns + offset + AFTER_LAST_EVENT_NS,
            wait_ns / 1e9,
        ]
        for at_ns, phase, answer in delivery.phases:
            values.append(at_ns + offset)
            if answer is None:
                alike.append(phase)
            else:
                alike += (phase, answer.code, answer.enhanced)
        key = tuple(alike)
        moulds = self._moulds.get(key)
        if moulds is None:
            moulds = self._make(record, delivery, origin, is_remote=parent.is_remote)
            if len(self._moulds) >= MAX_SHAPES:
                self._moulds.clear()
            self._moulds[key] = moulds

        lines = reply.lines
        text = self._attributes.redaction.text(lines[0] if len(lines) == 1 else reply.text)
        words = text.encode("utf-8", "replace")
        size = len(words)
        before_words = _BEFORE_WORDS[size] if size < 256 else text_head(9, names.REPLY_TEXT, size)
        of_attempt, of_transaction, shapes = moulds
        first = (
            TAGS[2], length(of_attempt.size + len(before_words) + size), of_attempt.fill(values), before_words,
            words,
        )  # fmt: skip

        values = [
            trace_id,
            span_id,
            parent.span_id.to_bytes(8, "big"),
            record.begun_ns + offset,
            record.ended_ns + offset + AFTER_LAST_EVENT_NS,
            origin,
        ]
        sender, recipients = self.domains(record)
        self._told = shapes, text, sender, recipients
        number = record.number
        own = b"".join(
            (
                _NUMBERS.small[number] if number < 0x80 else _NUMBERS(number),
                _SIZES(octets),
                sender.octets,
                recipients.octets,
            )
        )
        if identity.links:
            own = b"".join((own, *map(encode_link, identity.links)))
        second = (TAGS[2], length(of_transaction.size + len(own)), of_transaction.fill(values), own)
        return EncodedSpan(b"".join(first)), EncodedSpan(b"".join(second))

    def lines(self, record: TransactionRecord, identity: Identity) -> LinesOfMail:
        """What stands on the lines of a mail that is ordinary: that of which `spans` were made last."""
        shapes, text, sender, recipients = self._told
        delivery, connection = record.deliveries[0], record.connection
        attempt: Identity = delivery.trace
        assert connection is not None
        assert record.octets is not None
        ended_ns = delivery.ended_ns + AFTER_LAST_EVENT_NS, record.ended_ns + AFTER_LAST_EVENT_NS
        offset = record.wall_offset_ns
        return LinesOfMail(
            shapes,
            connection.info.id,
            text,
            record.number,
            record.octets,
            sender,
            recipients,
            ((ended_ns[0] - delivery.begun_ns) / 1e9, (ended_ns[1] - record.begun_ns) / 1e9),
            (attempt.context, identity.context),
            (ended_ns[0] + offset, ended_ns[1] + offset),
        )

    def domains(self, record: TransactionRecord) -> tuple[ShownDomains, ShownDomains]:
        """The attributes that tell the domains of sender and recipients."""
        _, at, domain = record.mail.reverse_path.rpartition("@")
        sender = self._senders.get(domain if at else "")
        if sender is None:
            sender = self._sender(record.mail.reverse_path)
            _keep(self._senders, domain if at else "", sender)
        if len(record.accepted) != 1:
            return sender, self._recipient_domains(record)
        _, at, domain = record.accepted[0].address.rpartition("@")
        recipient = self._recipients.get(domain if at else "")
        if recipient is None:
            recipient = self._recipient_domains(record)
            _keep(self._recipients, domain if at else "", recipient)
        return sender, recipient

    def _sender(self, path: str) -> ShownDomains:
        domain = self._attributes.redaction.domain(path)
        return ShownDomains() if domain is None else ShownDomains((names.MAIL_FROM_DOMAIN, domain))

    def _recipient_domains(self, record: TransactionRecord) -> ShownDomains:
        domains = self._attributes.redaction.domains(record.accepted)
        if len(domains) == 1:
            return ShownDomains((names.RCPT_DOMAINS, domains), (names.RCPT_DOMAIN, domains[0]))
        return ShownDomains((names.RCPT_DOMAINS, domains)) if domains else ShownDomains()

    def _make(self, record: TransactionRecord, delivery: DeliveryRecord, origin: bytes, *, is_remote: bool) -> _Moulds:
        events: list[bytes | str] = []
        for _, shape in describe_phases(delivery):
            events += (shape.before, "Q", shape.octets)
        of_attempt, _, _ = self._attributes.delivery(delivery)
        of_transaction, _, _ = self._attributes.transaction(record, is_in_application=is_remote)
        gap = f"{len(origin)}s"
        wait = (_WAIT, "d", SPAN_PAIRS[names.POOL_REUSED, delivery.is_reused])
        return _Moulds(
            Mould(*frame_of_span(of_attempt, is_remote=False), *wait, *events),
            Mould(*frame_of_span(of_transaction, is_remote=is_remote), gap),
            (line_shape(of_attempt), line_shape(of_transaction)),
        )


def _keep(kept: dict[str, ShownDomains], written: str, shown: ShownDomains) -> None:
    if len(kept) >= MAX_DOMAINS_KEPT:
        kept.clear()
    kept[written] = shown
