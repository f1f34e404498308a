"""Every name of our telemetry: spans, events, attributes, metrics, log fields, defined only here.

OpenTelemetry's registered names are used wherever one fits; they are copied as strings, since names in development move
from module to module of its Python package. Ours begin with ``smtp.``: no convention for SMTP exists yet. A name's
meaning never changes; a change is a new name and a new `SCHEMA_VERSION`.

deploy/reference/telemetry.md is made by `tables` and compared by a test.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

from otel_smtp.observing import DeliveryPhase
from otel_smtp.smtp.states import ConnState

SCHEMA_VERSION: Final = 2
SCOPE_NAME: Final = "otel_smtp"
# The version of the conventions that the registered names below were copied from.
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
DEFAULT_SERVICE_NAME: Final = "otel-smtp"

# An attribute's value as we make it. Never bytes or None: backends do not show them.
AttributeValue = str | int | float | bool | tuple[str, ...]
Attributes = Mapping[str, AttributeValue]

MAX_VALUE_CHARACTERS: Final = 256  # Tempo cuts at 2048; a reply line has 512; 256 holds every queue id that we know of
MAX_DOMAINS: Final = 10
MAX_EVENT_OCTETS: Final = 1024


class Type(StrEnum):
    """An attribute's type."""

    STRING = "string"
    INT = "int"
    DOUBLE = "double"
    BOOLEAN = "boolean"
    STRINGS = "string[]"


class On(StrEnum):
    """The carriers of an attribute."""

    CONNECTION = "connection span"
    TRANSACTION = "transaction span"
    DELIVERY = "delivery span"
    STATE = "state event"
    PHASE = "delivery event"
    RECIPIENT = "recipient event"
    SPOOL = "spool span"
    LINK = "link"
    METRIC = "metric"
    LOG = "log line"


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute's row in the tables."""

    name: str
    type: Type
    on: tuple[On, ...]
    when: str
    example: str


@dataclass(frozen=True, slots=True)
class SpanName:
    """A span's row in the tables."""

    name: str
    kind: str
    parent: str
    lasts: str


@dataclass(frozen=True, slots=True)
class EventName:
    """A span event's row in the tables."""

    name: str
    on: On
    when: str


class Instrument(StrEnum):
    """The kinds of metrics."""

    COUNTER = "counter"
    UP_DOWN = "updowncounter"
    GAUGE = "gauge"  # for values that do not add up
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        labels: names of its attributes; all their values come from closed sets.
        bounds: of a histogram's buckets, in `unit`.
    """

    name: str
    instrument: Instrument
    unit: str
    labels: tuple[str, ...]
    description: str
    bounds: tuple[float, ...] = ()


ATTRIBUTES: Final[dict[str, Attribute]] = {}
SPANS: Final[dict[str, SpanName]] = {}
EVENTS: Final[dict[str, EventName]] = {}
METRICS: Final[dict[str, Metric]] = {}


def _attribute(name: str, type_: Type, on: Iterable[On], when: str, example: str) -> str:
    assert name not in ATTRIBUTES, name
    ATTRIBUTES[name] = Attribute(name, type_, tuple(on), when, example)
    return name


def _span(name: str, kind: str, parent: str, lasts: str) -> str:
    SPANS[name] = SpanName(name, kind, parent, lasts)
    return name


def _event(name: str, on: On, when: str) -> str:
    EVENTS[name] = EventName(name, on, when)
    return name


def _metric(
    name: str,
    instrument: Instrument,
    unit: str,
    labels: Sequence[str],
    description: str,
    bounds: Sequence[float] = (),
) -> Metric:
    METRICS[name] = Metric(name, instrument, unit, tuple(labels), description, tuple(bounds))
    return METRICS[name]


# Spans ---------------------------------------------------------------------------------------------------------

SPAN_CONNECTION: Final = _span(
    "smtp.connection",
    "SERVER",
    "none: a root; a later segment links to the one before",
    "accept to Closed, or one segment of it",
)
SPAN_TRANSACTION: Final = _span(
    "smtp.transaction",
    "INTERNAL, or SERVER in the application's trace",
    "its connection, or the application's span",
    "MAIL to the final reply, RSET or loss",
)
SPAN_DELIVERY: Final = _span(
    "smtp.delivery",
    "CLIENT",
    "its transaction, also from the spool",
    "one attempt at one upstream: pool wait to final reply",
)

SPAN_SPOOL: Final = _span(
    "smtp.spool",
    "INTERNAL",
    "the stored transaction",
    "a moment: something befell a message in the spool without an attempt",
)

# Events --------------------------------------------------------------------------------------------------------

STATE_EVENTS: Final[Mapping[ConnState, str]] = {
    state: _event(f"smtp.state.{state.value.lower()}", On.CONNECTION, when)
    for state, when in {
        ConnState.NEW: "a socket was accepted",
        ConnState.ACTIVE: "the greeting, a 235 or the final 2yz of a message goes out; a handshake is done; after "
        "Reset; MAIL was accepted while Idle",
        ConnState.AUTH: "an AUTH command arrived",
        ConnState.DATA: "DATA, or the first BDAT chunk of a message, was accepted",
        ConnState.STARTTLS: "STARTTLS was accepted, or an implicit TLS handshake begins",
        ConnState.RESET: "RSET, or an EHLO or HELO that threw an open transaction away",
        ConnState.IDLE: "a transaction ended with the final reply to its message",
        ConnState.ERROR: "a reply with a code >= 400, or a failed TLS handshake",
        ConnState.CLOSED: "the transport is gone",
    }.items()
}
PHASE_EVENTS: Final[Mapping[DeliveryPhase, str]] = {
    phase: _event(f"smtp.upstream.{phase.value}", On.DELIVERY, when)
    for phase, when in {
        DeliveryPhase.PACED: "a limit held the mail back, and does no more",
        DeliveryPhase.POOL: "a pooled connection is at hand, or it is clear that a new one is needed",
        DeliveryPhase.CONNECT: "TCP is connected",
        DeliveryPhase.GREETING: "the upstream's greeting was read",
        DeliveryPhase.EHLO: "EHLO was answered",
        DeliveryPhase.STARTTLS: "TLS is established",
        DeliveryPhase.AUTH: "AUTH was answered",
        DeliveryPhase.MAIL: "MAIL was answered",
        DeliveryPhase.RCPT: "the recipients were answered; answers alike in a row are one event",
        DeliveryPhase.DATA: "DATA was answered",
        DeliveryPhase.CONTENT: "the content was written to its end",
        DeliveryPhase.REPLY: "the final reply was read",
    }.items()
}

RECIPIENT_EVENT: Final = _event(
    "smtp.recipient",
    On.TRANSACTION,
    "a recipient was refused or deferred, by us or by the upstream; at most 50, then one that counts the rest; of mail "
    "that the spool has, on the delivery that decided, or on smtp.spool",
)

TAKEN_OVER_EVENT: Final = _event(
    "smtp.spool.taken_over",
    On.DELIVERY,
    "from a queue that several gateways share: another one had this mail before, was silent, and may have delivered it",
)

# Attributes: where and who ---------------------------------------------------------------------------------------

_SPAN_ALL: Final = (On.CONNECTION, On.TRANSACTION, On.DELIVERY)

CONNECTION_ID: Final = _attribute(
    "smtp.connection.id",
    Type.STRING,
    (On.CONNECTION, On.TRANSACTION, On.LOG),
    "always; in the log also on deliveries, but for those from the spool",
    "6f1c0e2d9a4b4d0f8a57c3e1b2d4f6a8",
)
CONNECTION_SEGMENT: Final = _attribute(
    "smtp.connection.segment", Type.INT, (On.CONNECTION,), "always; from 1, counts the spans of one connection", "1"
)
CLIENT_ADDRESS: Final = _attribute(
    "client.address",
    Type.STRING,
    (On.CONNECTION, On.LOG),
    "unless client_ip = none; behind a believed PROXY header the address that it names",
    "192.0.2.7",
)
CLIENT_PORT: Final = _attribute("client.port", Type.INT, (On.CONNECTION,), "over TCP, unless client_ip = none", "50732")
SERVER_ADDRESS: Final = _attribute(
    "server.address",
    Type.STRING,
    (On.CONNECTION, On.DELIVERY),
    "always: the address that was connected to; on a delivery, the upstream's configured host",
    "127.0.0.1",
)
SERVER_PORT: Final = _attribute("server.port", Type.INT, (On.CONNECTION, On.DELIVERY), "over TCP", "2525")
NETWORK_PEER_ADDRESS: Final = _attribute(
    "network.peer.address",
    Type.STRING,
    (On.CONNECTION, On.DELIVERY, On.STATE),
    "where a PROXY header was believed: the proxy; on New; on a delivery, once connected, where it differs from "
    "`server.address`",
    "10.0.0.3",
)
NETWORK_PEER_PORT: Final = _attribute(
    "network.peer.port",
    Type.INT,
    (On.CONNECTION, On.DELIVERY, On.STATE),
    "with network.peer.address, over TCP",
    "41002",
)
NETWORK_LOCAL_ADDRESS: Final = _attribute("network.local.address", Type.STRING, (On.STATE,), "on New", "127.0.0.1")
NETWORK_LOCAL_PORT: Final = _attribute("network.local.port", Type.INT, (On.STATE,), "on New, over TCP", "2525")
NETWORK_TRANSPORT: Final = _attribute("network.transport", Type.STRING, (On.CONNECTION,), "always: tcp, unix", "tcp")
NETWORK_TYPE: Final = _attribute("network.type", Type.STRING, (On.CONNECTION,), "over TCP: ipv4, ipv6", "ipv4")
NETWORK_PROTOCOL_NAME: Final = _attribute(
    "network.protocol.name", Type.STRING, (On.CONNECTION,), "always: smtp, lmtp", "smtp"
)
LISTENER: Final = _attribute(
    "smtp.listener", Type.STRING, (On.CONNECTION, On.STATE, On.METRIC, On.LOG), "always; of the events, on New", "local"
)
HELO: Final = _attribute(
    "smtp.helo",
    Type.STRING,
    (On.CONNECTION,),
    "after HELO, EHLO or LHLO, unless addresses = none; hashed where addresses = hash; an address "
    "literal follows client_ip",
    "app-7d9f.example.com",
)
USER_NAME: Final = _attribute(
    "user.name", Type.STRING, (On.CONNECTION,), "authenticated, and addresses = full", "reports"
)
USER_HASH: Final = _attribute(
    "user.hash", Type.STRING, (On.CONNECTION,), "authenticated, and addresses = hash", "5d1f0c3a9be27764"
)
CONNECTION_MESSAGES: Final = _attribute(
    "smtp.connection.messages",
    Type.INT,
    (On.CONNECTION, On.STATE, On.LOG),
    "always: messages answered finally so far; of the events, on Idle and Closed",
    "3",
)
CONNECTION_ERRORS: Final = _attribute(
    "smtp.connection.errors",
    Type.INT,
    (On.CONNECTION, On.LOG),
    "always: replies >= 400 and failed handshakes so far",
    "0",
)
OCTETS_RECEIVED: Final = _attribute(
    "smtp.connection.octets_received", Type.INT, (On.CONNECTION, On.STATE, On.LOG), "when closed", "1843"
)
OCTETS_SENT: Final = _attribute(
    "smtp.connection.octets_sent", Type.INT, (On.CONNECTION, On.STATE, On.LOG), "when closed", "412"
)
CONNECTION_DURATION: Final = _attribute(
    "smtp.connection.duration",
    Type.DOUBLE,
    (On.CONNECTION, On.STATE),
    "when closed: seconds since accept, over all segments",
    "0.184",
)
CLOSE_REASON: Final = _attribute(
    "smtp.close.reason",
    Type.STRING,
    (On.CONNECTION, On.STATE, On.LOG),
    "when closed: quit, client_disconnect, timeout, too_many_errors, refused, "
    "tls_failure, protocol_mismatch, shutdown, internal_error",
    "quit",
)
PROBE: Final = _attribute(
    "smtp.probe",
    Type.BOOLEAN,
    (On.CONNECTION,),
    "true where the client connected and left without sending an octet",
    "true",
)

# Attributes: TLS and AUTH ----------------------------------------------------------------------------------------

TLS_MODE: Final = _attribute(
    "smtp.tls.mode",
    Type.STRING,
    (On.CONNECTION, On.STATE),
    "always: off, starttls, implicit; of the events, on New and StartTLS",
    "starttls",
)
TLS_PROTOCOL_VERSION: Final = _attribute(
    "tls.protocol.version", Type.STRING, (On.CONNECTION, On.DELIVERY, On.STATE), "after a handshake", "1.3"
)
TLS_CIPHER: Final = _attribute(
    "tls.cipher", Type.STRING, (On.CONNECTION, On.DELIVERY, On.STATE), "after a handshake", "TLS_AES_256_GCM_SHA384"
)
TLS_RESUMED: Final = _attribute("tls.resumed", Type.BOOLEAN, (On.CONNECTION, On.DELIVERY), "after a handshake", "false")
AUTH_MECHANISM: Final = _attribute(
    "smtp.auth.mechanism",
    Type.STRING,
    (On.CONNECTION, On.STATE, On.METRIC),
    "after AUTH; a known name or other",
    "SCRAM-SHA-256",
)
AUTH_RESULT: Final = _attribute("smtp.auth.result", Type.STRING, (On.METRIC,), "always: accepted, refused", "accepted")

# Attributes: states ----------------------------------------------------------------------------------------------

STATE: Final = _attribute("smtp.state", Type.STRING, (On.STATE, On.METRIC), "always", "Active")
# "smtp.state" with ".previous" and others beside it is what the schema says; stores that nest names show both.
STATE_PREVIOUS: Final = _attribute("smtp.state.previous", Type.STRING, (On.STATE, On.METRIC), "but on New", "New")
STATE_LEVEL: Final = _attribute(
    "smtp.state.level",
    Type.STRING,
    (On.STATE,),
    "always: the level, which pulses (Reset, Error) leave as it is",
    "Active",
)
STATE_SEQUENCE: Final = _attribute(
    "smtp.state.sequence", Type.INT, (On.STATE,), "always; from 1, over all segments", "2"
)
STATE_PREVIOUS_DURATION: Final = _attribute(
    "smtp.state.previous_duration",
    Type.DOUBLE,
    (On.STATE,),
    "but on New: seconds since the transition before",
    "0.0021",
)
RESET_CAUSE: Final = _attribute(
    "smtp.reset.cause", Type.STRING, (On.STATE,), "on Reset: rset, ehlo, helo, lhlo", "rset"
)
VERB: Final = _attribute(
    "smtp.verb",
    Type.STRING,
    (On.STATE, On.METRIC),
    "on Error: the verb that was answered; a known one or other",
    "RCPT",
)
REPLY_CODE: Final = _attribute(
    "smtp.reply.code",
    Type.INT,
    (On.TRANSACTION, On.DELIVERY, On.STATE, On.PHASE, On.RECIPIENT, On.METRIC, On.LOG),
    "where a reply was given: ours on Error and on transactions, but for those that an upstream accepted, whose "
    "delivery has it; the upstream's on deliveries",
    "250",
)
REPLY_ENHANCED_CODE: Final = _attribute(
    "smtp.reply.enhanced_code",
    Type.STRING,
    (On.TRANSACTION, On.DELIVERY, On.STATE, On.PHASE, On.RECIPIENT, On.LOG),
    "where the reply had one; likewise",
    "2.0.0",
)
REPLY_TEXT: Final = _attribute(
    "smtp.reply.text",
    Type.STRING,
    (On.TRANSACTION, On.DELIVERY, On.STATE, On.RECIPIENT, On.LOG),
    "where there was a reply; likewise, but the log has the upstream's words also on transactions that it accepted; "
    "cleaned, at most 256 characters, addresses in it as `addresses` says",
    "Ok: queued as 4XyZ12",
)
ERROR_TYPE: Final = _attribute(
    "error.type",
    Type.STRING,
    (*_SPAN_ALL, On.SPOOL, On.STATE, On.LOG),
    "on Error events; on spans that failed: a class of ErrorType, else the reply code",
    "upstream_unavailable",
)
FAILURE_REASON: Final = _attribute(
    "smtp.failure.reason",
    Type.STRING,
    (*_SPAN_ALL, On.SPOOL, On.STATE, On.LOG),
    "where something failed for another reason than a reply: in words, on the attempt or the connection, and on the "
    "transaction; the description of the status too",
    "certificate verify failed: self-signed certificate",
)
LOGGER: Final = _attribute(
    "smtp.logger", Type.STRING, (On.LOG,), "in OTLP, always: the module that speaks", "otel_smtp.access"
)
EXCEPTION_TYPE: Final = _attribute(
    "exception.type", Type.STRING, (On.LOG,), "in OTLP, on unexpected errors", "ConnectionResetError"
)
EXCEPTION_STACKTRACE: Final = _attribute(
    "exception.stacktrace",
    Type.STRING,
    (On.LOG,),
    "in OTLP, on unexpected errors; the end of a long one",
    "Traceback ...",
)

# Attributes: the mail ----------------------------------------------------------------------------------------------

TRANSACTION_NUMBER: Final = _attribute(
    "smtp.transaction.number",
    Type.INT,
    (On.TRANSACTION, On.STATE, On.LOG),
    "always; from 1 on its connection; of the events, on Data",
    "1",
)
RECIPIENT_COUNT: Final = _attribute(
    "smtp.transaction.recipient_count",
    Type.INT,
    (On.TRANSACTION, On.STATE, On.LOG),
    "always: recipients accepted at RCPT; of the events, on Data",
    "2",
)
RECIPIENTS_REFUSED: Final = _attribute(
    "smtp.transaction.recipients_refused",
    Type.INT,
    (On.TRANSACTION, On.LOG),
    "always: recipients refused with 5yz, at RCPT or with the content",
    "0",
)
RECIPIENTS_DEFERRED: Final = _attribute(
    "smtp.transaction.recipients_deferred",
    Type.INT,
    (On.TRANSACTION, On.LOG),
    "always: recipients deferred with 4yz, at RCPT or with the content",
    "0",
)
MESSAGE_SIZE: Final = _attribute(
    "smtp.message.size", Type.INT, (On.TRANSACTION, On.LOG), "when the content is complete: its octets", "20480"
)
MESSAGE_ID: Final = _attribute(
    "smtp.message.id", Type.STRING, (On.TRANSACTION,), "opted in, and the header has one", "<20260101.1@example.com>"
)
MAIL_FROM_DOMAIN: Final = _attribute(
    "smtp.mail.from.domain",
    Type.STRING,
    (On.TRANSACTION, On.LOG),
    'addresses = domain or full; "" for the null path',
    "example.com",
)
MAIL_FROM_ADDRESS: Final = _attribute(
    "smtp.mail.from.address",
    Type.STRING,
    (On.TRANSACTION, On.LOG),
    "addresses = full, or hash: hashed",
    "news@example.com",
)
RCPT_DOMAINS: Final = _attribute(
    "smtp.rcpt.domains",
    Type.STRINGS,
    (On.TRANSACTION, On.LOG),
    "addresses = domain or full: of all recipients, refused ones too, at most 10",
    "example.net",
)
RCPT_DOMAIN: Final = _attribute(
    "smtp.rcpt.domain",
    Type.STRING,
    (On.TRANSACTION, On.RECIPIENT, On.LOG),
    "addresses = domain or full: where all recipients share one; on recipient events, always",
    "example.net",
)
RCPT_ADDRESSES: Final = _attribute(
    "smtp.rcpt.addresses",
    Type.STRINGS,
    (On.TRANSACTION, On.LOG),
    "addresses = full, or hash: hashed; of all recipients, refused ones too, at most 10",
    "bob@example.net",
)
RCPT_ADDRESS: Final = _attribute(
    "smtp.rcpt.address", Type.STRING, (On.RECIPIENT, On.LOG), "addresses = full, or hash: hashed", "bob@example.net"
)
RECIPIENT_FATE: Final = _attribute(
    "smtp.recipient.fate",
    Type.STRING,
    (On.RECIPIENT, On.METRIC, On.LOG),
    "always: refused, deferred, bounced, expired, removed, held; of the metric also how the transaction of those ended "
    "that were accepted",
    "refused",
)
RECIPIENTS_NOT_SHOWN: Final = _attribute(
    "smtp.recipient.more",
    Type.INT,
    (On.RECIPIENT, On.LOG),
    "on the last event, where there are more than 50: how many recipients it stands for",
    "12",
)
RCPT_REFUSED: Final = _attribute(
    "smtp.rcpt.refused",
    Type.STRINGS,
    (On.LOG,),
    "on the line of a transaction: the refused recipients, as far as `addresses` shows them, with the reply to each, "
    "at most 10",
    "example.net: 550 5.1.1 No such user",
)
RCPT_DEFERRED: Final = _attribute(
    "smtp.rcpt.deferred",
    Type.STRINGS,
    (On.LOG,),
    "likewise: the deferred ones",
    "example.net: 450 4.7.1 Greylisted",
)
BODY: Final = _attribute(
    "smtp.body", Type.STRING, (On.TRANSACTION,), "where the client gave BODY=: 7bit, 8bitmime, binarymime", "8bitmime"
)
SPOOL_ID: Final = _attribute(
    "smtp.spool.id",
    Type.STRING,
    (On.TRANSACTION, On.DELIVERY, On.SPOOL, On.LOG),
    "the message is, or was, durable in the spool",
    "01J9ZQ4T3M",
)
SPOOL_ACTION: Final = _attribute(
    "smtp.spool.action",
    Type.STRING,
    (On.SPOOL, On.LOG),
    "always: expired, removed, held, released, given_up; but for the first by an operator, or held as part of too many "
    "crashes; superseded: the result of an attempt came too late, and another gateway makes it again",
    "held",
)
SPOOL_OPERATOR: Final = _attribute(
    "smtp.spool.operator",
    Type.STRING,
    (On.SPOOL, On.LOG),
    "an operator did it: who, as `--as` said, or the login, the database's user, or the client of the page",
    "ann",
)
MESSAGE_KIND: Final = _attribute(
    "smtp.message.kind",
    Type.STRING,
    (On.DELIVERY, On.SPOOL, On.LOG),
    "always: mail, or a message of our own that reports on one: bounce, delay_warning, success_report",
    "mail",
)
OUTCOME: Final = _attribute(
    "smtp.outcome",
    Type.STRING,
    (On.TRANSACTION, On.DELIVERY, On.METRIC, On.LOG),
    "always: relayed, partly_relayed, queued, refused, deferred, aborted, unknown",
    "relayed",
)

# Attributes: delivery ----------------------------------------------------------------------------------------------

UPSTREAM_NAME: Final = _attribute(
    "smtp.upstream.name",
    Type.STRING,
    (On.DELIVERY, On.RECIPIENT, On.METRIC, On.LOG),
    "always: the configured name; on recipient events, where an upstream said so",
    "provider",
)
PEER_SERVICE: Final = _attribute(
    "peer.service", Type.STRING, (On.DELIVERY,), "always: the upstream's name, for Tempo's service graph", "provider"
)
SERVICE_PEER_NAME: Final = _attribute(
    "service.peer.name", Type.STRING, (On.DELIVERY,), "always: the same under its newer name", "provider"
)
DELIVERY_ATTEMPT: Final = _attribute(
    "smtp.delivery.attempt", Type.INT, (On.DELIVERY, On.SPOOL, On.LOG), "always; from 1", "1"
)
DELIVERY_ACCEPTED: Final = _attribute(
    "smtp.delivery.recipients_accepted",
    Type.INT,
    (On.DELIVERY, On.LOG),
    "always: recipients by the upstream's last answer about each",
    "2",
)
DELIVERY_REFUSED: Final = _attribute(
    "smtp.delivery.recipients_refused", Type.INT, (On.DELIVERY, On.LOG), "always: likewise, 5yz", "0"
)
DELIVERY_DEFERRED: Final = _attribute(
    "smtp.delivery.recipients_deferred", Type.INT, (On.DELIVERY, On.LOG), "always: likewise, 4yz", "0"
)
POSSIBLE_DUPLICATE: Final = _attribute(
    "smtp.delivery.possible_duplicate",
    Type.BOOLEAN,
    (On.DELIVERY, On.LOG),
    "from the spool, where an attempt before may have been taken: its reply was lost, or we were killed",
    "true",
)
TAKEN_OVER_FROM: Final = _attribute(
    "smtp.spool.taken_over.from",
    Type.STRING,
    (On.PHASE,),
    "the mail was taken over: `service.instance.id` of the gateway that had it",
    "627cc493-f310-47de-96bd-71410b7dec09",
)
TAKEN_OVER_SILENT: Final = _attribute(
    "smtp.spool.taken_over.silent",
    Type.DOUBLE,
    (On.PHASE,),
    "likewise: seconds for which nothing had been heard of it",
    "10.2",
)
POOL_REUSED: Final = _attribute(
    "smtp.pool.reused",
    Type.BOOLEAN,
    (On.DELIVERY,),
    "a connection was at hand: whether it had served before",
    "true",
)
POOL_WAIT: Final = _attribute(
    "smtp.pool.wait", Type.DOUBLE, (On.DELIVERY,), "a connection was at hand: seconds waited for it", "0.0003"
)
LIMIT_NAME: Final = _attribute(
    "smtp.limit.name", Type.STRING, (On.PHASE, On.METRIC), "a limit held the mail back: which", "provider-rate"
)
LIMIT_WAIT: Final = _attribute(
    "smtp.limit.wait", Type.DOUBLE, (On.PHASE,), "a limit held the mail back: for how many seconds", "1.97"
)
ROUND_TRIPS: Final = _attribute("smtp.round_trips", Type.INT, (On.DELIVERY, On.LOG), "always", "2")

# Attributes: links, metrics --------------------------------------------------------------------------------------

SAMPLING_REASON: Final = _attribute(
    "smtp.sampling.reason",
    Type.STRING,
    (*_SPAN_ALL, On.SPOOL),
    "where the sampler dropped it and its outcome kept it: errors, slow",
    "errors",
)
LINK_TYPE: Final = _attribute(
    "smtp.link.type",
    Type.STRING,
    (On.LINK,),
    "always: connection, application, previous_segment, spooled_transaction; reported_mail: from a delivery of a "
    "bounce, a warning or a report to the transaction of the mail it reports on",
    "connection",
)


class LinkType(StrEnum):
    """The target of a link: the value of `LINK_TYPE`."""

    CONNECTION = "connection"
    APPLICATION = "application"
    PREVIOUS_SEGMENT = "previous_segment"
    SPOOLED_TRANSACTION = "spooled_transaction"
    REPORTED_MAIL = "reported_mail"


REFUSED_REASON: Final = _attribute(
    "smtp.refused.reason", Type.STRING, (On.METRIC,), "always: capacity, client_limit, gave_way, ..., other", "capacity"
)
UPSTREAM_CONNECTION_STATE: Final = _attribute(
    "smtp.upstream.connection.state", Type.STRING, (On.METRIC,), "always: idle, busy, opening", "idle"
)
SPOOL_STATE: Final = _attribute(
    "smtp.spool.state", Type.STRING, (On.METRIC,), "always: ready, deferred, active, held, corrupt", "deferred"
)
SPOOL_VERB: Final = _attribute(
    "smtp.spool.verb", Type.STRING, (On.METRIC,), "always: submit, finish, claim, read, limit, other", "submit"
)
RECEIVER_NAME: Final = _attribute(
    "smtp.notify.receiver", Type.STRING, (On.METRIC,), "always: the configured name", "app.example.com:443"
)
NOTIFY_RESULT: Final = _attribute(
    "smtp.notify.result",
    Type.STRING,
    (On.METRIC,),
    "always: sent, failed (an attempt, which is made again), expired, dropped (too many waited)",
    "sent",
)
SIGNAL: Final = _attribute(
    "smtp.telemetry.signal", Type.STRING, (On.METRIC,), "always: traces, logs, metrics", "traces"
)
DROP_REASON: Final = _attribute(
    "smtp.telemetry.drop_reason",
    Type.STRING,
    (On.METRIC,),
    "always: queue_full, too_large, export_failed, rejected, keep_rate, shutdown",
    "queue_full",
)

# Metrics -----------------------------------------------------------------------------------------------------------

# Kestrel's connection buckets, and longer: an SMTP session may idle for minutes.
_CONNECTION_SECONDS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
# From 50 us: an attempt that finds no connection, or a breaker open, lasts no longer. Then the HTTP, RPC and messaging
# conventions', and longer: an upstream may take ten minutes for its final reply.
_OPERATION_SECONDS: Final = (
    *(0.00005, 0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075),
    *(0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60, 300),
)
# From 50 us: a state may last as long as a call of ours, and a wait less.
_SHORT_SECONDS: Final = (0.00005, 0.0001, 0.0005, 0.001, 0.005, *_CONNECTION_SECONDS)
_WAIT_SECONDS: Final = (0.00005, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30)
# The wait of a mail in the queue: milliseconds if all is well, days where a recipient's server is away.
_AGE_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800),
    *(3600, 14_400, 43_200, 86_400, 259_200, 432_000),
)
_SIZE_OCTETS: Final = tuple(float(1024 * 4**power) for power in range(8))  # 1 KiB to 16 MiB

ACTIVE_CONNECTIONS: Final = _metric(
    "smtp.server.active_connections",
    Instrument.UP_DOWN,
    "{connection}",
    (LISTENER, STATE),
    "Client connections that are open now, by level",
)
SERVER_CONNECTION_DURATION: Final = _metric(
    "smtp.server.connection.duration",
    Instrument.HISTOGRAM,
    "s",
    (LISTENER,),
    "Life of client connections",
    _CONNECTION_SECONDS,
)
STATE_DURATION: Final = _metric(
    "smtp.server.state.duration",
    Instrument.HISTOGRAM,
    "s",
    (STATE,),
    "Time spent in a state until the next transition",
    _SHORT_SECONDS,
)
TRANSITIONS: Final = _metric(
    "smtp.server.transitions",
    Instrument.COUNTER,
    "{transition}",
    (STATE_PREVIOUS, STATE),
    "State transitions of client connections",
)
REPLIES: Final = _metric(
    "smtp.server.replies", Instrument.COUNTER, "{reply}", (VERB, REPLY_CODE), "Replies written to clients"
)
TRANSACTIONS: Final = _metric(
    "smtp.server.transactions", Instrument.COUNTER, "{transaction}", (OUTCOME,), "Mail transactions by how they ended"
)
TRANSACTION_DURATION: Final = _metric(
    "smtp.server.transaction.duration",
    Instrument.HISTOGRAM,
    "s",
    (OUTCOME,),
    "Mail transactions, from MAIL to the final reply, RSET or loss",
    _SHORT_SECONDS,
)
SERVER_RECIPIENTS: Final = _metric(
    "smtp.server.recipients",
    Instrument.COUNTER,
    "{recipient}",
    (RECIPIENT_FATE,),
    "Recipients by what became of them: in their transaction, and once more when a queued one has ended",
)
SERVER_MESSAGE_SIZE: Final = _metric(
    "smtp.server.message.size", Instrument.HISTOGRAM, "By", (), "Size of received messages", _SIZE_OCTETS
)
SERVER_AUTH: Final = _metric(
    "smtp.server.auth", Instrument.COUNTER, "{attempt}", (AUTH_MECHANISM, AUTH_RESULT), "AUTH attempts of clients"
)
REFUSED: Final = _metric(
    "smtp.server.refused", Instrument.COUNTER, "{connection}", (REFUSED_REASON,), "Connections refused at accept"
)
PROBES: Final = _metric(
    "smtp.server.probes",
    Instrument.COUNTER,
    "{connection}",
    (LISTENER,),
    "Connections that came and went without sending an octet",
)
DELIVERY_DURATION: Final = _metric(
    "smtp.client.delivery.duration",
    Instrument.HISTOGRAM,
    "s",
    (UPSTREAM_NAME, OUTCOME),
    "Delivery attempts, from the wait for a connection to the final reply",
    _OPERATION_SECONDS,
)
FIRST_ATTEMPT_AGE: Final = _metric(
    "smtp.client.first_attempt.age",
    Instrument.HISTOGRAM,
    "s",
    (UPSTREAM_NAME,),
    "From the acceptance of a queued mail to the first attempt at it",
    _AGE_SECONDS,
)
DELIVERY_AGE: Final = _metric(
    "smtp.client.delivery.age",
    Instrument.HISTOGRAM,
    "s",
    (UPSTREAM_NAME,),
    "From the acceptance of a queued mail to its delivery, for each attempt that the upstream took",
    _AGE_SECONDS,
)
CLIENT_CONNECTIONS: Final = _metric(
    "smtp.client.connections",
    Instrument.UP_DOWN,
    "{connection}",
    (UPSTREAM_NAME, UPSTREAM_CONNECTION_STATE),
    "Connections to upstreams",
)
CLIENT_POOL_WAIT: Final = _metric(
    "smtp.client.pool.wait",
    Instrument.HISTOGRAM,
    "s",
    (UPSTREAM_NAME,),
    "Wait for an upstream connection",
    _WAIT_SECONDS,
)
CLIENT_PACE_WAIT: Final = _metric(
    "smtp.client.pace.wait",
    Instrument.HISTOGRAM,
    "s",
    (LIMIT_NAME,),
    "Wait for a rate limit, of the mails that had to wait",
    _AGE_SECONDS,
)
SPOOL_MESSAGES: Final = _metric(
    "smtp.spool.messages",
    Instrument.UP_DOWN,
    "{message}",
    (SPOOL_STATE,),
    "Messages in the spool; of a shared queue one of its gateways reports it for all",
)
SPOOL_AGE: Final = _metric("smtp.spool.age", Instrument.GAUGE, "s", (), "Age of the oldest message in the spool")
SPOOL_DEAD: Final = _metric(
    "smtp.spool.dead", Instrument.UP_DOWN, "By", (), "Disk space of the spool that no message needs any more"
)
SPOOL_STORE: Final = _metric(
    "smtp.spool.store",
    Instrument.HISTOGRAM,
    "s",
    (SPOOL_VERB,),
    "Work of the spool's store: messages and results of attempts are made durable in groups, which count once",
    _WAIT_SECONDS,
)
SPOOL_GROUP_SIZE: Final = _metric(
    "smtp.spool.group_size",
    Instrument.HISTOGRAM,
    "{item}",
    (),
    "Messages and results of attempts that were made durable together",
    tuple(float(2**power) for power in range(10)),
)
SPOOL_GATEWAYS: Final = _metric(
    "smtp.spool.gateways", Instrument.GAUGE, "{gateway}", (), "Gateways that share the queue, as this one knows"
)
SPOOL_AWAY: Final = _metric(
    "smtp.spool.away",
    Instrument.GAUGE,
    "s",
    (),
    "For how long the database of a shared queue has been silent, beyond what leases allow; 0: it answers",
)
SPOOL_POSSIBLE_DUPLICATES: Final = _metric(
    "smtp.spool.possible_duplicates",
    Instrument.COUNTER,
    "{delivery}",
    (),
    "Attempts at mail that an upstream may have already: an attempt before was cut off, or its reply was lost",
)
SPOOL_TAKEN_OVER: Final = _metric(
    "smtp.spool.taken_over",
    Instrument.COUNTER,
    "{delivery}",
    (),
    "Deliveries of gateways that died, which go on as possible duplicates; counted by the one that found out",
)
SPOOL_STALE: Final = _metric(
    "smtp.spool.stale", Instrument.COUNTER, "{delivery}", (), "Results refused since another gateway had the delivery"
)
SPOOL_UNANSWERED: Final = _metric(
    "smtp.spool.unanswered",
    Instrument.COUNTER,
    "{message}",
    (),
    "Messages that were stored though their client was answered 451: it may send them again",
)
NOTIFY_OUTCOMES: Final = _metric(
    "smtp.notify.outcomes",
    Instrument.COUNTER,
    "{outcome}",
    (RECEIVER_NAME, NOTIFY_RESULT),
    "Outcomes sent to the application, and attempts that failed",
)
NOTIFY_PENDING: Final = _metric(
    "smtp.notify.pending", Instrument.UP_DOWN, "{outcome}", (RECEIVER_NAME,), "Outcomes that wait for their receiver"
)
NOTIFY_AGE: Final = _metric(
    "smtp.notify.age", Instrument.GAUGE, "s", (RECEIVER_NAME,), "Age of the oldest outcome that waits"
)
TELEMETRY_DROPPED: Final = _metric(
    "smtp.telemetry.dropped",
    Instrument.COUNTER,
    "{item}",
    (SIGNAL, DROP_REASON),
    "Spans, log records and data points that were not exported",
)

# Log fields --------------------------------------------------------------------------------------------------------

LOG_TIMESTAMP: Final = "timestamp"
LOG_LEVEL: Final = "level"
LOG_LOGGER: Final = "logger"
LOG_EVENT: Final = "event"
LOG_TRACE_ID: Final = "trace_id"
LOG_SPAN_ID: Final = "span_id"
LOG_TRACEBACK: Final = "traceback"
LOG_DURATION: Final = "duration"  # seconds from the start to the end of the line's subject
LOG_SUPPRESSED: Final = "suppressed"
LOG_FIELDS: Final[Mapping[str, str]] = {
    LOG_TIMESTAMP: "ISO 8601, UTC, microseconds",
    LOG_LEVEL: "debug, info, warning, error, critical",
    LOG_LOGGER: "the module that speaks",
    LOG_EVENT: "what happened: a constant text, or the name of a span or state event",
    LOG_TRACE_ID: "32 hexadecimal digits, where there is a trace",
    LOG_SPAN_ID: "16 hexadecimal digits, with the trace id",
    LOG_DURATION: "seconds, on the lines that end a connection, transaction or delivery",
    LOG_TRACEBACK: "in one line, on unexpected errors",
    LOG_SUPPRESSED: "where lines like it were left out, too many in one second: how many",
}


def as_lists() -> dict[str, list[dict[str, object]]]:
    """The same for programs: a list for each kind."""
    return {
        "spans": [asdict(one) for one in SPANS.values()],
        "events": [asdict(one) for one in EVENTS.values()],
        "attributes": [asdict(one) for one in ATTRIBUTES.values()],
        "metrics": [asdict(one) for one in METRICS.values()],
        "log_fields": [{"name": name, "holds": holds} for name, holds in LOG_FIELDS.items()],
    }


def tables() -> str:
    """The reference tables of telemetry, in Markdown."""
    return "\n".join(
        [
            *_table(
                ("Span", "Kind", "Parent", "Lasts"),
                ((f"`{s.name}`", s.kind, s.parent, s.lasts) for s in SPANS.values()),
            ),
            "",
            *_table(("Event", "On", "When"), ((f"`{e.name}`", e.on, e.when) for e in EVENTS.values())),
            "",
            *_table(
                ("Attribute", "Type", "On", "When present", "Example"),
                ((f"`{a.name}`", a.type, ", ".join(a.on), a.when, f"`{a.example}`") for a in ATTRIBUTES.values()),
            ),
            "",
            *_table(
                ("Metric", "Instrument", "Unit", "Attributes", "Tells"),
                (
                    (f"`{m.name}`", m.instrument, m.unit, ", ".join(f"`{label}`" for label in m.labels), m.description)
                    for m in METRICS.values()
                ),
            ),
            "",
            *_table(("Log field", "Holds"), ((f"`{name}`", holds) for name, holds in LOG_FIELDS.items())),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield _row(head)
    yield _row(["---"] * len(head))
    for row in rows:
        yield _row(row)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
