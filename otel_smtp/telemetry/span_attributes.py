"""Which attributes a finished connection, transaction or delivery has: stated here once, for all formats.

Each is described by a shape (`shapes`), found by the values that come from small sets, and by the pairs that vary.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Final

from opentelemetry.trace import SpanKind

from otel_smtp.observing import (
    ConnectionRecord,
    DeliveryRecord,
    Endpoint,
    Outcome,
    RecipientRecord,
    TransactionRecord,
)
from otel_smtp.observing.records import MOST_REFUSED
from otel_smtp.smtp.envelope import Body, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.states import CloseReason, ErrorReply
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import Attributes
from otel_smtp.telemetry.records import EventRecord
from otel_smtp.telemetry.redaction import Redaction, clean
from otel_smtp.telemetry.shapes import Column, Pair, SpanShape, span_table
from otel_smtp.telemetry.state_events import ENHANCED_CODE

Described = tuple[SpanShape, list[Pair], Sequence[Pair]]
"""The parts of a span, besides ids, times, events and links; and what its line in the log, which stands alone, has
besides: what another span of the trace has."""

# Failures of the gateway or of what it depends on. All else is the client's doing, or a policy that was kept: an Error
# event, not an ERROR status.
_OUR_FAILURES: Final = frozenset(
    {
        ErrorType.UPSTREAM_UNAVAILABLE,
        ErrorType.UPSTREAM_AUTH,
        ErrorType.UPSTREAM_TLS,
        ErrorType.UPSTREAM_PROTOCOL,
        ErrorType.OUTCOME_UNKNOWN,
        ErrorType.STORAGE,
        ErrorType.SHUTDOWN,
        ErrorType.INTERNAL,
    }
)
# How connections end that failed where no reply could say so.
_CLOSED_BY: Final = {CloseReason.INTERNAL_ERROR: ErrorType.INTERNAL, CloseReason.TLS_FAILURE: ErrorType.TLS}
# Subjects of enhanced codes by which an upstream says that mail system (3) or network (4) failed (RFC 3463 3.4, 3.5).
_FAILURE_SUBJECTS: Final = frozenset({3, 4})

_when: Final = attrgetter("at_ns")
# With one that is no longer, an event about a recipient has room for all the rest.
_SHORT_ADDRESS_CHARACTERS: Final = 96

_CONNECTIONS: Final = span_table(
    names.SPAN_CONNECTION,
    SpanKind.SERVER,
    (
        names.LISTENER,
        names.NETWORK_TRANSPORT,
        names.NETWORK_PROTOCOL_NAME,
        names.NETWORK_TYPE,
        names.TLS_MODE,
        names.TLS_PROTOCOL_VERSION,
        names.TLS_CIPHER,
        names.TLS_RESUMED,
        names.AUTH_MECHANISM,
        names.CLOSE_REASON,
        names.PROBE,
        names.ERROR_TYPE,
        names.FAILURE_REASON,
    ),
)


def _lower(body: Body) -> str:
    return body.value.lower()


_TRANSACTION_HEADER: Final = (
    names.RECIPIENT_COUNT,
    names.RECIPIENTS_REFUSED,
    names.RECIPIENTS_DEFERRED,
    Column(names.BODY, _lower),
    names.OUTCOME,
    names.REPLY_CODE,
    ENHANCED_CODE,
    names.ERROR_TYPE,
    names.FAILURE_REASON,
    None,  # whether an upstream accepted it: then the reply is on the attempt's span, and here only in the log
)
_OF_REPLY: Final = (names.REPLY_CODE, names.REPLY_ENHANCED_CODE)
_TRANSACTIONS: Final = span_table(names.SPAN_TRANSACTION, SpanKind.INTERNAL, _TRANSACTION_HEADER, _OF_REPLY)
# An edge of a service graph needs the application's CLIENT span as direct parent of a SERVER span.
_APPLICATIONS_TRANSACTIONS: Final = span_table(names.SPAN_TRANSACTION, SpanKind.SERVER, _TRANSACTION_HEADER, _OF_REPLY)

_DELIVERIES: Final = span_table(
    names.SPAN_DELIVERY,
    SpanKind.CLIENT,
    (
        names.MESSAGE_KIND,
        names.DELIVERY_ATTEMPT,
        names.DELIVERY_ACCEPTED,
        names.DELIVERY_REFUSED,
        names.DELIVERY_DEFERRED,
        names.POSSIBLE_DUPLICATE,
        names.SERVER_ADDRESS,
        names.SERVER_PORT,
        names.UPSTREAM_NAME,
        names.PEER_SERVICE,
        names.SERVICE_PEER_NAME,
        names.NETWORK_PEER_ADDRESS,
        names.NETWORK_PEER_PORT,
        names.TLS_PROTOCOL_VERSION,
        names.TLS_CIPHER,
        names.TLS_RESUMED,
        names.ROUND_TRIPS,
        names.OUTCOME,
        names.REPLY_CODE,
        ENHANCED_CODE,
        names.ERROR_TYPE,
        names.FAILURE_REASON,
    ),
)


_SPOOLED: Final = span_table(
    names.SPAN_SPOOL,
    SpanKind.INTERNAL,
    (
        names.SPOOL_ACTION,
        names.SPOOL_OPERATOR,
        names.MESSAGE_KIND,
        names.DELIVERY_ATTEMPT,
        names.ERROR_TYPE,
        names.FAILURE_REASON,
    ),
)


class SpanAttributes:
    """Describes spans.

    Args:
        redaction: what may be shown of people.
        with_message_id: put `Message-ID` on transactions.
    """

    def __init__(self, redaction: Redaction, *, with_message_id: bool = False) -> None:
        self.redaction = redaction
        self.with_message_id = with_message_id
        # Of the latest reply: a delivery and its transaction show the same one.
        self._worded: Reply | None = None
        self._words = ""

    # Connections -------------------------------------------------------------------------------------------------

    def connection(self, record: ConnectionRecord, failed: SpanShape | None, *, is_closed: bool) -> Described:
        """A segment of a connection: the last one, or one after which the connection goes on.

        Args:
            failed: a transaction in it that failed; the segment has then failed as well.
        """
        info, client, tls, redaction = record.info, record.client, record.tls, self.redaction
        reason = record.end.reason if is_closed else None
        network_type = error_type = None
        failure = record.failure
        if reason is not None and reason in _CLOSED_BY:
            error_type = _CLOSED_BY[reason].value
        elif failed is not None:
            error_type = str(failed.constant[names.ERROR_TYPE])
            failure = failed.description or None
        if info.transport == "tcp":
            network_type = "ipv6" if ":" in client.host else "ipv4"
        shape = _CONNECTIONS[
            info.listener,
            info.transport,
            info.protocol,
            network_type,
            info.tls_mode,
            None if tls is None else tls.version,
            None if tls is None else tls.cipher,
            None if tls is None else tls.resumed,
            record.auth_mechanism,
            reason,
            True if is_closed and is_probe(record) else None,
            error_type,
            None if failure is None else clean(failure),
        ]
        pairs: list[Pair] = [
            (names.CONNECTION_ID, info.id),
            (names.CONNECTION_SEGMENT, record.segment),
            (names.SERVER_ADDRESS, clean(record.server.host)),
            (names.CONNECTION_MESSAGES, record.messages),
            (names.CONNECTION_ERRORS, record.errors),
        ]
        if record.server.port is not None:
            pairs.append((names.SERVER_PORT, record.server.port))
        pairs += _endpoint(names.CLIENT_ADDRESS, names.CLIENT_PORT, client, redaction)
        if client is not info.peer:
            pairs += _endpoint(names.NETWORK_PEER_ADDRESS, names.NETWORK_PEER_PORT, info.peer, redaction)
        if record.hello_name and (hello := redaction.host_name(record.hello_name)) is not None:
            pairs.append((names.HELO, hello))
        if record.user is not None:
            pairs += redaction.user(record.user).items()
        if is_closed:
            pairs += self.totals(record)
        return shape, pairs, ()

    def addresses(self, record: ConnectionRecord) -> list[Pair]:
        """The row of New: peer, local address, listener."""
        info = record.info
        pairs = _endpoint(names.NETWORK_PEER_ADDRESS, names.NETWORK_PEER_PORT, info.peer, self.redaction)
        pairs.append((names.NETWORK_LOCAL_ADDRESS, clean(info.local.host)))
        if info.local.port is not None:
            pairs.append((names.NETWORK_LOCAL_PORT, info.local.port))
        pairs.append((names.LISTENER, info.listener))
        return pairs

    def error(self, detail: ErrorReply, failure: str | None) -> list[Pair]:
        """The row of Error, beside what comes from small sets: the words, and the transaction that was open.

        Args:
            failure: of the connection, where no reply says it.
        """
        pairs: list[Pair] = []
        if detail.reply is not None:
            pairs.append((names.REPLY_TEXT, self.words(detail.reply)))
        elif failure is not None:
            pairs.append((names.FAILURE_REASON, clean(failure)))
        if detail.transaction is not None:
            pairs.append((names.TRANSACTION_NUMBER, detail.transaction))
        return pairs

    def words(self, reply: Reply) -> str:
        """A reply's text, as it may be shown."""
        lines = reply.lines
        self._words = self.redaction.text(lines[0] if len(lines) == 1 else reply.text)
        self._worded = reply
        return self._words

    @staticmethod
    def totals(record: ConnectionRecord) -> list[Pair]:
        """The row of Closed: octets and duration."""
        return [
            (names.OCTETS_RECEIVED, record.end.octets_received),
            (names.OCTETS_SENT, record.end.octets_sent),
            (names.CONNECTION_DURATION, (record.end.at_ns - record.opened_ns) / 1e9),
        ]

    @staticmethod
    def connection_at_start(record: ConnectionRecord, segment: int) -> Attributes:
        """The attributes of a segment for a sampler."""
        return {names.LISTENER: record.listener, names.CONNECTION_SEGMENT: segment}

    # Transactions ------------------------------------------------------------------------------------------------

    def transaction(self, record: TransactionRecord, *, is_in_application: bool) -> Described:
        """A transaction of a client."""
        reply, mail, accepted = record.reply, record.mail, record.accepted
        theirs: Reply | None = None
        if reply is not None and reply.code < 400 and record.deliveries:
            theirs = record.deliveries[-1].reply
            if theirs is not None and theirs.code >= 400:
                theirs = None
        table = _APPLICATIONS_TRANSACTIONS if is_in_application else _TRANSACTIONS
        shape = table[
            len(accepted),
            record.refused_count,
            record.deferred_count,
            mail.body,
            record.outcome,
            None if reply is None else reply.code,
            None if reply is None else reply.enhanced,
            our_failure(record.outcome, reply, record.error_type),
            None if record.failure is None else clean(record.failure),
            theirs is not None,
        ]
        connection = record.connection
        pairs: list[Pair] = [] if connection is None else [(names.CONNECTION_ID, connection.id)]
        pairs.append((names.TRANSACTION_NUMBER, record.number))
        if record.octets is not None:
            pairs.append((names.MESSAGE_SIZE, record.octets))
        if self.with_message_id and record.message_id is not None:
            pairs.append((names.MESSAGE_ID, clean(record.message_id)))
        if record.spool_id is not None:
            pairs.append((names.SPOOL_ID, clean(record.spool_id)))
        redaction = self.redaction
        if (domain := redaction.domain(mail.reverse_path)) is not None:
            pairs.append((names.MAIL_FROM_DOMAIN, domain))
        refused = record.refused
        recipients = accepted if not refused else [*accepted, *(_not_among(accepted, refused))]
        if domains := redaction.domains(recipients):
            pairs.append((names.RCPT_DOMAINS, domains))
            if len(domains) == 1:
                pairs.append((names.RCPT_DOMAIN, domains[0]))
        on_line: Sequence[Pair] = ()
        if theirs is not None:
            # A 2yz of ours says less than the upstream's own words, with its queue id.
            on_line = [(names.REPLY_TEXT, self._words if theirs is self._worded else self.words(theirs))]
        elif reply is not None:
            pairs.append((names.REPLY_TEXT, self.words(reply)))
        if redaction.shows_mailboxes:
            if (address := redaction.mailbox(mail.reverse_path)) is not None:
                pairs.append((names.MAIL_FROM_ADDRESS, address))
            if addresses := redaction.mailboxes(recipients):
                pairs.append((names.RCPT_ADDRESSES, addresses))
        return shape, pairs, on_line

    @staticmethod
    def transaction_at_start(record: TransactionRecord) -> Attributes:
        """The attributes of a transaction for a sampler."""
        assert record.connection is not None
        return {names.CONNECTION_ID: record.connection.id, names.TRANSACTION_NUMBER: record.number}

    # Deliveries --------------------------------------------------------------------------------------------------

    def delivery(self, record: DeliveryRecord) -> Described:
        """An attempt at an upstream."""
        reply, transaction, server, tls = record.reply, record.transaction, record.server, record.tls
        upstream = record.upstream
        peer = record.peer
        if peer is not None and peer.host == server.host and peer.port == server.port:
            peer = None  # it says nothing new where the upstream's name is an address
        shape = _DELIVERIES[
            transaction.kind,
            record.attempt,
            record.accepted_count,
            record.refused_count,
            record.deferred_count,
            transaction.is_possible_duplicate or None,
            server.host,
            server.port,
            upstream,
            upstream,
            upstream,
            None if peer is None else peer.host,
            None if peer is None else peer.port,
            None if tls is None else tls.version,
            None if tls is None else tls.cipher,
            None if tls is None else tls.resumed,
            record.round_trips,
            record.outcome,
            None if reply is None else reply.code,
            None if reply is None else reply.enhanced,
            attempt_failure(record.outcome, reply, record.error_type)
            or (ErrorType.UPSTREAM_REFUSED.value if record.refused_count or record.deferred_count else None),
            None if record.failure is None else clean(record.failure),
        ]
        connection = transaction.connection
        on_line: list[Pair] = []
        pairs: list[Pair] = []
        if connection is not None:
            on_line.append((names.CONNECTION_ID, connection.id))  # the transaction's span has it
        else:
            pairs.append(_origin(transaction))
        if record.pool_wait_ns is not None:
            pairs += (names.POOL_WAIT, record.pool_wait_ns / 1e9), (names.POOL_REUSED, record.is_reused)
        if reply is not None:
            pairs.append((names.REPLY_TEXT, self.words(reply)))
        return shape, pairs, on_line

    @staticmethod
    def delivery_at_start(record: DeliveryRecord) -> Attributes:
        """The attributes of an attempt for a sampler."""
        server, upstream = record.server, record.upstream
        port: list[Pair] = [] if server.port is None else [(names.SERVER_PORT, server.port)]
        return dict(
            [
                _origin(record.transaction),
                (names.DELIVERY_ATTEMPT, record.attempt),
                (names.SERVER_ADDRESS, server.host),
                *port,
                (names.UPSTREAM_NAME, upstream),
                (names.PEER_SERVICE, upstream),
                (names.SERVICE_PEER_NAME, upstream),
            ]
        )

    # The spool ---------------------------------------------------------------------------------------------------

    def spooled(self, record: TransactionRecord) -> Described:
        """The span of an action on a message in the spool."""
        has_failed = record.error_type is not None
        shape = _SPOOLED[
            record.action,
            record.operator,
            record.kind,
            record.attempt or None,
            record.error_type,
            record.failure if has_failed else None,
        ]
        return shape, [_origin(record)], ()

    # Recipients --------------------------------------------------------------------------------------------------

    def recipients(self, refused: Sequence[RecipientRecord], count: int, wall_offset_ns: int) -> list[EventRecord]:
        """The events about recipients that did not get a mail.

        Args:
            refused: those that are known.
            count: how many there are of them.
        """
        # An upstream may have refused one before us, and decided only later that no recipient gets the mail.
        shown = sorted(refused[:MOST_REFUSED], key=_when)
        events = [EventRecord(one.at_ns + wall_offset_ns, names.RECIPIENT_EVENT, self.recipient(one)) for one in shown]
        if len(shown) < count:
            time_ns = shown[-1].at_ns + wall_offset_ns
            rest = {names.RECIPIENTS_NOT_SHOWN: count - len(shown)}
            events.append(EventRecord(time_ns, names.RECIPIENT_EVENT, rest))
        return events

    def recipient(self, one: RecipientRecord) -> Attributes:
        """The event of a recipient's fate."""
        attributes: dict[str, names.AttributeValue] = {names.RECIPIENT_FATE: one.fate.value}
        for domain in self.redaction.domains((one.recipient,)):
            attributes[names.RCPT_DOMAIN] = domain
        for address in self.redaction.mailboxes((one.recipient,)):
            attributes[names.RCPT_ADDRESS] = address
        if one.reply is not None:
            attributes[names.REPLY_CODE] = one.reply.code
            if one.reply.enhanced is not None:
                attributes[names.REPLY_ENHANCED_CODE] = str(one.reply.enhanced)
            attributes[names.REPLY_TEXT] = self.words(one.reply)
        if one.upstream is not None:
            attributes[names.UPSTREAM_NAME] = one.upstream
        if len(str(attributes.get(names.RCPT_ADDRESS, ""))) > _SHORT_ADDRESS_CHARACTERS:
            _cut_to_event(attributes)
        return attributes


def _cut_to_event(attributes: dict[str, names.AttributeValue]) -> None:
    """Cut what is long about a recipient until an event holds it: first the address, whose domain stands beside it."""
    octets = {name: len(str(value).encode()) for name, value in attributes.items()}
    # In an event, its own name and time, and what OTLP has around each attribute.
    excess = sum(octets.values()) + sum(map(len, octets)) + 12 * len(octets) + 64 - names.MAX_EVENT_OCTETS
    for name, least in ((names.RCPT_ADDRESS, _SHORT_ADDRESS_CHARACTERS), (names.REPLY_TEXT, 0)):
        if excess > 0 and name in attributes:
            kept = str(attributes[name]).encode()[: max(least, octets[name] - excess)].decode(errors="ignore")
            attributes[name] = kept
            excess -= octets[name] - len(kept.encode())


def _not_among(accepted: Sequence[Recipient], refused: Sequence[RecipientRecord]) -> list[Recipient]:
    """The recipients that were refused at RCPT already."""
    known = set(map(id, accepted))
    return [one.recipient for one in refused if id(one.recipient) not in known]


def is_probe(record: ConnectionRecord) -> bool:
    """Whether the client connected and left without sending an octet: a health check."""
    return record.end.octets_received == 0 and record.end.reason is CloseReason.CLIENT_DISCONNECT


def _origin(transaction: TransactionRecord) -> Pair:
    """Where a delivery's mail came from: a connection, or the spool."""
    connection = transaction.connection
    if connection is not None:
        return names.CONNECTION_ID, connection.id
    return names.SPOOL_ID, clean(transaction.spool_id or "")


def _endpoint(address_name: str, port_name: str, client: Endpoint, redaction: Redaction) -> list[Pair]:
    """A client's address, as far as it may be shown, and its port with it."""
    address = redaction.ip(client.host)
    if address is None:
        return []
    return [(address_name, address)] if client.port is None else [(address_name, address), (port_name, client.port)]


def our_failure(outcome: Outcome | None, reply: Reply | None, error_type: ErrorType | None) -> str | None:
    """The `error.type` of a transaction that failed by the gateway's fault or by what it depends on; None else."""
    kind = error_type if error_type is not None or reply is None else reply.error_type
    if kind is None:
        return ErrorType.OUTCOME_UNKNOWN.value if outcome is Outcome.UNKNOWN else None
    if kind in _OUR_FAILURES:
        return kind.value
    if outcome is Outcome.UNKNOWN:
        return ErrorType.OUTCOME_UNKNOWN.value
    is_failing = reply is not None and reply.enhanced is not None and reply.enhanced.subject in _FAILURE_SUBJECTS
    return kind.value if kind is ErrorType.UPSTREAM_REFUSED and is_failing else None


def attempt_failure(outcome: Outcome | None, reply: Reply | None, error_type: ErrorType | None) -> str | None:
    """The `error.type` of a delivery that failed: any final 4yz or 5yz, any fault of transport; None else."""
    if error_type is not None:
        return error_type.value
    if reply is not None and reply.code >= 400:
        return str(reply.code) if reply.error_type is None else reply.error_type.value
    return ErrorType.OUTCOME_UNKNOWN.value if outcome is Outcome.UNKNOWN else None
