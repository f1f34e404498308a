"""Every setting: its key, its meaning, the form of its value, its default and the default's source.

A field is a setting, its name is the key, its default is the default. Loading, error messages, `otel-smtp check` and
the README's table all read them here. A structure holds checked values. Other packages never get these structures, only
the few values that each needs, from `gateway.wiring`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, get_args

import msgspec

from otel_smtp.config.addresses import (
    HOST_NAME_PATTERN,
    LOOPBACK_NETWORKS,
    AddressPattern,
    ListenAddress,
    MailboxKind,
    Network,
    NetworkKind,
    ReceiverUrlKind,
    UpstreamUrl,
    UpstreamUrlKind,
    is_local,
    url_endpoint,
)
from otel_smtp.config.values import (
    DAY,
    HOUR,
    KIB,
    MIB,
    MINUTE,
    Boolean,
    Choice,
    Duration,
    FilePath,
    Integer,
    Many,
    Rate,
    RateKind,
    Secret,
    SecretText,
    Size,
    Text,
    ValueKind,
)
from otel_smtp.observing import Endpoint
from otel_smtp.smtp.extensions import CAN_BE_DISABLED
from otel_smtp.smtp.states import TlsMode

ListenerProtocol = Literal["smtp", "lmtp"]
AuthPolicy = Literal["off", "optional", "required"]
ReceivedPolicy = Literal["full", "anonymous"]
TraceContextIn = Literal["auto", "parent", "link", "ignore"]
TraceContextOut = Literal["inject", "strip", "keep"]
DeliveryMode = Literal["direct", "queue", "direct-then-queue"]
DeliveryStrategy = Literal["transparent", "buffered"]
ContentNewlines = Literal["normalize", "reject"]
UpstreamAuth = Literal["auto", "plain", "login", "scram-sha-256", "xoauth2", "off"]
LimitPer = Literal["messages", "recipients"]
OUTCOMES: Final = ("delivered", "bounced", "refused", "expired")
BouncePolicy = Literal["mail", "log", "off"]
AddressPolicy = Literal["domain", "none", "hash", "full"]
ClientIpPolicy = Literal["full", "prefix", "none"]
StateEvents = Literal["span", "log", "both"]
LogFormat = Literal["auto", "json", "text"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Key(msgspec.Struct, frozen=True):
    """The description of one setting.

    Attributes:
        meaning: for the README's table.
        kind: how its value is written.
        source: where the default comes from, if that is not obvious.
        default: the table's text if the default is derived from other settings.
        secret: never shown; may also be given as a file, by the key with `_file` appended.
        must_be_readable: the file is read at start.
    """

    meaning: str
    kind: ValueKind
    source: str = ""
    default: str = ""
    secret: bool = False
    must_be_readable: bool = False


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of settings."""


_NAME: Final = Text("letters, digits and ._:/[]- , at most 64", r"[A-Za-z0-9\[/][A-Za-z0-9._:/\[\]-]{0,63}")
_COUNT: Final = Integer()


class ListenerTable(Table, frozen=True, kw_only=True):
    """A listener's address, and its clients' permissions."""

    name: Annotated[str, Key("the listener's name in spans, metrics and logs", _NAME)] = "local"
    address: Annotated[
        tuple[Endpoint, ...],
        Key("where to listen: `host:port`, `[v6]:port` or `unix:/path`", Many(ListenAddress(), may_be_empty=False)),
    ] = (Endpoint("127.0.0.1", 2525), Endpoint("::1", 2525))
    protocol: Annotated[ListenerProtocol, Key("the protocol", Choice(get_args(ListenerProtocol)))] = "smtp"
    tls: Annotated[TlsMode, Key("TLS of its connections", Choice(tuple(TlsMode), TlsMode))] = TlsMode.OFF
    tls_cert: Annotated[Path | None, Key("certificate chain, PEM", FilePath(), must_be_readable=True)] = None
    tls_key: Annotated[Path | None, Key("its private key, PEM", FilePath(), must_be_readable=True)] = None
    tls_required: Annotated[bool, Key("answer 530 to mail before STARTTLS", Boolean(), "RFC 3207 4")] = False
    auth: Annotated[AuthPolicy, Key("whether clients log in", Choice(get_args(AuthPolicy)))] = "off"
    auth_users_file: Annotated[
        Path | None,
        Key("one line per user, `NAME:HASH`, made by `otel-smtp passwd`", FilePath(), must_be_readable=True),
    ] = None
    auth_in_clear: Annotated[bool, Key("offer AUTH on connections without TLS", Boolean(), "RFC 4954 4")] = False
    allow: Annotated[tuple[Network, ...], Key("networks that may relay without AUTH", Many(NetworkKind()))] = (
        LOOPBACK_NETWORKS
    )
    open_relay: Annotated[
        bool, Key("consent: `allow` covers everybody who can reach the listener, and that is meant", Boolean())
    ] = False
    proxy_protocol_from: Annotated[
        tuple[Network, ...], Key("networks whose PROXY header is required and trusted", Many(NetworkKind()))
    ] = ()
    trace_context: Annotated[
        TraceContextIn,
        Key(
            "a client's `traceparent`: `auto` is `parent` for loopback and authenticated clients, else `link`",
            Choice(get_args(TraceContextIn)),
        ),
    ] = "auto"
    default_domain: Annotated[
        str,
        Key(
            "added to addresses without one, as `root`",
            Text("a domain", HOST_NAME_PATTERN),
            default="they are refused",
        ),
    ] = ""
    received: Annotated[
        ReceivedPolicy,
        Key("whether our Received field names the client, or `anonymous`", Choice(get_args(ReceivedPolicy))),
    ] = "full"

    @property
    def is_exposed(self) -> bool:
        """Whether other machines can reach it."""
        return not all(is_local(address) for address in self.address)


class LimitsTable(Table, frozen=True, kw_only=True):
    """Bounds on everything that a client can make grow."""

    message_size: Annotated[
        int,
        Key("octets of one message; less where the upstream's SIZE is less", Size(), "RFC 1870; what providers take"),
    ] = 25 * MIB
    recipients: Annotated[
        int, Key("recipients of one transaction", _COUNT, "RFC 5321 4.5.3.1.8 asks for 100; Postfix takes 1000")
    ] = 1000
    connections: Annotated[
        int,
        Key(
            "connections at once, of one process, at most a quarter of its file limit; beyond, the one that is least"
            " missed gives way to a client that has fewer, else 421",
            _COUNT,
            "1024 files / 4",
        ),
    ] = 256
    connections_per_client: Annotated[
        int, Key("of these, from one client address other than loopback", _COUNT, "a quarter of the connections")
    ] = 64
    stress: Annotated[
        int,
        Key("percent of the connections; above it, `timeouts.command_under_stress` applies", Integer(1, 100)),
    ] = 80
    messages_per_connection: Annotated[
        int | None,
        Key(
            "messages on one connection, then 421",
            Integer(may_be_off=True),
            "a mass mailer's connection must not break in the middle",
        ),
    ] = None
    errors: Annotated[
        int,
        Key(
            "commands on one connection that are refused for a fault of the client's, then 421",
            _COUNT,
            "Postfix disconnects at 20 and stalls at 10",
        ),
    ] = 10
    refusals: Annotated[
        int,
        Key(
            "others that are refused on one connection between two messages that are accepted, beyond `recipients`; "
            "then 421",
            _COUNT,
        ),
    ] = 1000
    junk_commands: Annotated[
        int, Key("NOOP, RSET, VRFY, EHLO without mail between them, then 421", _COUNT, "Postfix: 100")
    ] = 100
    command_line: Annotated[
        int, Key("octets of a command line", Size(512, MIB), "RFC 5321 4.5.3.1.4 asks for 512; Postfix takes 2048")
    ] = 2048
    auth_line: Annotated[
        int, Key("octets of an AUTH command, and of a line of its exchange", Size(512, MIB), "RFC 4954 4")
    ] = 12288
    text_line: Annotated[
        int, Key("octets of a line of content", Size(1000, MIB), "RFC 5321 4.5.3.1.6 asks for 1000; senders exceed it")
    ] = 65535
    header_size: Annotated[int, Key("octets of the header block", Size(1000, 16 * MIB))] = 512 * KIB
    header_lines: Annotated[
        int, Key("lines of the header block", _COUNT, "a thousand recipients may all be named in To")
    ] = 10_000
    hops: Annotated[int, Key("Received fields in a message: more is a loop", _COUNT, "RFC 5321 6.3 asks for 100")] = 100
    auth_failures: Annotated[
        int, Key("failed logins on one connection, then 421", _COUNT, "RFC 4954: not before three")
    ] = 3
    auth_failures_per_minute: Annotated[
        int,
        Key(
            "failed logins from one client address, counted by each process, then 421 to its connections; to loopback, "
            "five in a second",
            _COUNT,
        ),
    ] = 10
    octets_per_second: Annotated[
        int, Key("minimum rate at which a client sends content", _COUNT, "Postfix: smtpd_min_data_rate")
    ] = 500


class TimeoutsTable(Table, frozen=True, kw_only=True):
    """How long the gateway waits for a client."""

    command: Annotated[float, Key("idle between commands", Duration(), "RFC 5321 4.5.3.2.7: at least 5 minutes")] = (
        5 * MINUTE
    )
    command_under_stress: Annotated[
        float, Key("the same, while most connections are in use (`limits.stress`)", Duration(), "Postfix: 10 s")
    ] = 10.0
    data: Annotated[float, Key("the whole content of a message, however slow the client", Duration())] = 20 * MINUTE
    session: Annotated[float | None, Key("a whole connection", Duration(may_be_off=True))] = None
    tls_handshake: Annotated[float, Key("a TLS handshake", Duration())] = 30.0
    shutdown_grace: Annotated[
        float,
        Key("open transactions at shutdown", Duration(0.0), "below the 30 s after which Kubernetes kills a pod"),
    ] = 25.0


class DeliveryTable(Table, frozen=True, kw_only=True):
    """When and how mail is relayed."""

    mode: Annotated[
        DeliveryMode,
        Key(
            "`direct`: the client gets the upstream's answer; `queue`: durable on disk, then 250; "
            "`direct-then-queue`: direct, and mail that fails temporarily is queued",
            Choice(get_args(DeliveryMode)),
        ),
    ] = "direct"
    strategy: Annotated[
        DeliveryStrategy,
        Key(
            "`transparent`: each recipient is asked upstream; `buffered`: the whole transaction in one burst, "
            "and one refused recipient refuses the message for all (but for LMTP clients, who get a reply for each)",
            Choice(get_args(DeliveryStrategy)),
        ),
    ] = "transparent"
    content_newlines: Annotated[
        ContentNewlines,
        Key("bare CR or LF in content: made CRLF, or 550", Choice(get_args(ContentNewlines)), "RFC 5321 2.3.8"),
    ] = "normalize"


class UpstreamTimeoutTable(Table, frozen=True, kw_only=True):
    """How long the gateway waits for an upstream."""

    connect: Annotated[float, Key("TCP connection", Duration())] = 30.0
    greeting: Annotated[
        float, Key("greeting, and TLS handshake", Duration(), "RFC 5321 4.5.3.2.1 says 300 s; our client waits too")
    ] = MINUTE
    command: Annotated[float, Key("reply to EHLO, AUTH, MAIL, RCPT", Duration(), "RFC 5321 4.5.3.2.2, 4.5.3.2.3")] = (
        5 * MINUTE
    )
    data: Annotated[float, Key("354 after DATA", Duration(), "RFC 5321 4.5.3.2.4")] = 2 * MINUTE
    block: Annotated[float, Key("room for the next block of content", Duration(), "RFC 5321 4.5.3.2.5")] = 3 * MINUTE
    reply: Annotated[
        float,
        Key(
            "final reply after the content",
            Duration(),
            "RFC 5321 4.5.3.2.6 says 600 s; our client waits as long, so we must answer earlier",
            default="570s; 10m in mode queue",
        ),
    ] = 570.0


class UpstreamTable(Table, frozen=True, kw_only=True):
    """Where mail is relayed to; several in order of preference."""

    name: Annotated[str, Key("its name in spans, metrics and logs", _NAME, default="its host and port")] = ""
    url: Annotated[
        UpstreamUrl,
        Key(
            "`smtp://` clear, `smtp+starttls://` TLS required and verified, `smtps://` implicit TLS, `lmtp://`; "
            "default ports 25, 587, 465, 24",
            UpstreamUrlKind(),
            default="(required)",
        ),
    ]
    username: Annotated[str, Key("user name to log in with; never sent in clear to another machine", Text())] = ""
    password: Annotated[Secret | None, Key("password, or the access token of xoauth2", SecretText(), secret=True)] = (
        None
    )
    password_file: Annotated[Path | None, Key("file that holds it", FilePath(), must_be_readable=True)] = None
    auth: Annotated[UpstreamAuth, Key("SASL mechanism", Choice(get_args(UpstreamAuth)))] = "auto"
    token_url: Annotated[
        str,
        Key(
            "OAuth 2 token endpoint, for xoauth2; tokens are fetched and renewed off the mail path",
            ReceiverUrlKind(),
            default="no token is fetched",
        ),
    ] = ""
    client_id: Annotated[str, Key("OAuth 2 client", Text())] = ""
    client_secret: Annotated[Secret | None, Key("its secret", SecretText(), secret=True)] = None
    client_secret_file: Annotated[Path | None, Key("file that holds it", FilePath(), must_be_readable=True)] = None
    refresh_token: Annotated[
        Secret | None,
        Key("OAuth 2 refresh token; without one, client credentials", SecretText(), "RFC 6749 4.4, 6", secret=True),
    ] = None
    refresh_token_file: Annotated[Path | None, Key("file that holds it", FilePath(), must_be_readable=True)] = None
    scope: Annotated[str, Key("OAuth 2 scope, if the provider wants one", Text())] = ""
    ca_file: Annotated[
        Path | None,
        Key("authorities to trust, PEM", FilePath(), default="the system's", must_be_readable=True),
    ] = None
    tls_cert: Annotated[
        Path | None, Key("our own certificate, PEM, if the upstream asks for one", FilePath(), must_be_readable=True)
    ] = None
    tls_key: Annotated[Path | None, Key("its private key, PEM", FilePath(), must_be_readable=True)] = None
    server_name: Annotated[
        str, Key("name to verify", Text("a host name", HOST_NAME_PATTERN), default="the URL's host")
    ] = ""
    connections: Annotated[
        int, Key("connections at once, of one process", _COUNT, "Postfix: 20 to one destination")
    ] = 20
    connections_total: Annotated[
        int | None,
        Key(
            "connections at once that a provider allows: of all gateways that share a queue together, else of all "
            "workers. Mail waits for one; it is handed on after 100 messages, or 5 s in which it was not used",
            Integer(1, 10_000, may_be_off=True),
        ),
    ] = None
    recipients_per_transaction: Annotated[
        int, Key("recipients of one transaction; the others go in further ones", _COUNT, "RFC 5321 4.5.3.1.8")
    ] = 100
    messages_per_connection: Annotated[int, Key("messages on one connection, then a new one", _COUNT)] = 100
    connection_age: Annotated[
        float, Key("age at which a connection is not used again", Duration(), "Postfix: 300 s")
    ] = 5 * MINUTE
    connection_idle: Annotated[
        float, Key("time after which an unused connection is closed", Duration(), "below the timeouts of upstreams")
    ] = 30.0
    disable: Annotated[
        tuple[str, ...],
        Key('extensions that are never used though it offers them, as `["CHUNKING"]`', Many(Choice(CAN_BE_DISABLED))),
    ] = ()
    reencode_8bit: Annotated[
        bool,
        Key(
            "re-encode 8-bit parts (quoted-printable, base64) where it lacks 8BITMIME, in place of a refusal; "
            "this breaks DKIM signatures",
            Boolean(),
            "RFC 6152 3",
        ),
    ] = False
    limits: Annotated[
        tuple[str, ...],
        Key(
            "names of `[[limit]]` that all hold for it; mail waits: in mode direct for at most 270 s, then 451 4.7.1",
            Many(_NAME),
        ),
    ] = ()
    reply_line: Annotated[
        int, Key("octets of a line of a reply; more: close", Size(512, MIB), "RFC 5321 4.5.3.1.5 asks for 512")
    ] = 2048
    reply_lines: Annotated[int, Key("lines of a reply; more: close", _COUNT)] = 100
    senders: Annotated[
        tuple[str, ...], Key("serve only these senders, as `*@example.com`; none: all", Many(AddressPattern()))
    ] = ()
    recipients: Annotated[tuple[str, ...], Key("serve only these recipients; none: all", Many(AddressPattern()))] = ()
    trace_context: Annotated[
        TraceContextOut | None,
        Key(
            "`inject` our `traceparent`, `strip` the client's, or `keep` it",
            Choice(get_args(TraceContextOut)),
            default="inject for loopback, else strip",
        ),
    ] = None
    timeout: UpstreamTimeoutTable = UpstreamTimeoutTable()

    def __post_init__(self) -> None:
        if not self.name:
            msgspec.structs.force_setattr(self, "name", str(self.url.endpoint))
        if self.trace_context is None:
            # A trace id is no secret, but a provider need not see it.
            msgspec.structs.force_setattr(self, "trace_context", "inject" if self.url.is_local else "strip")


class NotifyTable(Table, frozen=True, kw_only=True):
    """An application that the gateway notifies of each recipient's outcome; several are notified independently."""

    name: Annotated[
        str,
        Key("its name in metrics and logs; waiting outcomes belong to it", _NAME, default="the URL's host and port"),
    ] = ""
    url: Annotated[
        str,
        Key(
            "where outcomes are POSTed, as CloudEvents: an https URL, or http on this machine; needs a queue mode",
            ReceiverUrlKind(),
            default="(required)",
        ),
    ]
    key: Annotated[
        Secret | None,
        Key(
            "signs time and body (HMAC-SHA256, Standard Webhooks): `whsec_` and base64 of 24 octets or more, or at "
            "least 24 other characters",
            SecretText(
                "whsec_ and base64 of at least 24 octets, or at least 24 other characters, in one line",
                r"whsec_(?:[A-Za-z0-9+/]{4}){8,}(?:[A-Za-z0-9+/]{2,3}={0,2})?|(?!whsec_).{24,}",
            ),
            default="(required)",
            secret=True,
        ),
    ] = None
    key_file: Annotated[Path | None, Key("file that holds it", FilePath(), must_be_readable=True)] = None
    events: Annotated[
        tuple[str, ...],
        Key(
            "the ends that are reported: `delivered`, `bounced` (refused for good, and the sender gets a bounce), "
            "`refused` (the same without a bounce), `expired`",
            Many(Choice(OUTCOMES), may_be_empty=False),
        ),
    ] = OUTCOMES
    ca_file: Annotated[
        Path | None, Key("authorities to trust, PEM", FilePath(), default="the system's", must_be_readable=True)
    ] = None
    connections: Annotated[int, Key("requests at once, per process", Integer(1, 100))] = 4
    timeout: Annotated[
        float,
        Key(
            "a whole exchange; an outcome that is not accepted by then is sent again, as `spool.retry` says",
            Duration(0.1),
        ),
    ] = 10.0
    most_pending: Annotated[
        int, Key("outcomes that wait for it; beyond, new ones are dropped and counted, and mail goes on", _COUNT)
    ] = 100_000

    def __post_init__(self) -> None:
        if not self.name and self.url:
            msgspec.structs.force_setattr(self, "name", str(url_endpoint(self.url)))


class RateLimitTable(Table, frozen=True, kw_only=True):
    """A rate that a provider allows; several, each named by the upstreams that it holds for."""

    name: Annotated[str, Key("what `upstream.limits` calls it, and metrics", _NAME, default="(required)")]
    rate: Annotated[
        Rate,
        Key(
            "how much may leave, as `30/m`: in no second (`s`), minute (`m`), hour (`h`) or day (`d`) more than that",
            RateKind(),
            default="(required)",
        ),
    ]
    burst: Annotated[int, Key("of these, how much may leave at once", _COUNT, "1: spread evenly")] = 1
    per: Annotated[LimitPer, Key("what is counted", Choice(get_args(LimitPer)))] = "messages"


class RewriteTable(Table, frozen=True, kw_only=True):
    """Changes to the envelope, for providers that take only their own customers' addresses."""

    sender: Annotated[
        str,
        Key(
            "every envelope sender but the null sender of notices becomes this address; the content is not touched",
            MailboxKind(),
            default="senders stay as they are",
        ),
    ] = ""


class SpoolTable(Table, frozen=True, kw_only=True):
    """The durable store of the queue modes."""

    directory: Annotated[Path | None, Key("directory of queued mail; one gateway owns it", FilePath())] = None
    url: Annotated[
        Secret | None,
        Key(
            "`postgresql://...`: several gateways on one queue; in place of a directory",
            SecretText("postgresql://user@host/database", "postgres(?:ql)?://.+"),
            secret=True,
        ),
    ] = None
    url_file: Annotated[Path | None, Key("file that holds the URL", FilePath(), must_be_readable=True)] = None
    schema: Annotated[
        str,
        Key(
            "with `spool.url`: the database's schema; made by `otel-smtp queue migrate`",
            Text("lower case letters, digits and _, at most 63", r"(?!pg_)[a-z_][a-z0-9_]{0,62}"),
        ),
    ] = "otel_smtp"
    takeover_after: Annotated[
        float,
        Key(
            "with `spool.url`: silence of a gateway after which the others take its deliveries over",
            Duration(3.0, 5 * MINUTE),
        ),
    ] = 10.0
    retry: Annotated[
        tuple[float, ...],
        Key(
            "waits between attempts, each +-20 %; the last repeats",
            Many(Duration(1.0), may_be_empty=False),
            "RFC 5321 4.5.4.1: at least 30 minutes after the first attempts",
        ),
    ] = (30.0, MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE, 20 * MINUTE, 40 * MINUTE, HOUR)
    max_age: Annotated[
        float, Key("age at which mail is given up and bounced", Duration(1.0), "RFC 5321 4.5.4.1: 4 to 5 days")
    ] = 5 * DAY
    warn_after: Annotated[
        float | None,
        Key(
            "age at which the sender is notified of the delay, once",
            Duration(1.0, may_be_off=True),
            "sendmail: 4 h",
            default="4h; half of a max_age that is below 8h",
        ),
    ] = 4 * HOUR
    bounce: Annotated[
        BouncePolicy,
        Key("after a permanent failure: a bounce, a log line only, or neither", Choice(get_args(BouncePolicy))),
    ] = "mail"
    notice_sender: Annotated[
        str,
        Key(
            "envelope sender of bounces and warnings for upstreams that refuse the null sender",
            MailboxKind(),
            default="such notices are held",
        ),
    ] = ""
    most_messages: Annotated[
        int,
        Key("messages that wait; beyond, new mail gets 452 4.3.1, as it does where the disk is nearly full", _COUNT),
    ] = 1_000_000
    most_octets: Annotated[
        int | None,
        Key("octets of messages that wait; beyond, 452 4.3.1", Size(MIB, 2**20 * 1024 * MIB, may_be_off=True)),
    ] = None


class TelemetryTable(Table, frozen=True, kw_only=True):
    """What telemetry shows. OpenTelemetry's own `OTEL_*` variables say where it goes."""

    addresses: Annotated[
        AddressPolicy,
        Key(
            "mail addresses and user names: domain only, none, keyed hash, or in full", Choice(get_args(AddressPolicy))
        ),
    ] = "domain"
    addresses_hash_key: Annotated[Secret | None, Key("key of the hash", SecretText(), secret=True)] = None
    addresses_hash_key_file: Annotated[Path | None, Key("file that holds it", FilePath(), must_be_readable=True)] = None
    client_ip: Annotated[
        ClientIpPolicy,
        Key("client addresses: in full, network only (/24, /48), or none", Choice(get_args(ClientIpPolicy))),
    ] = "full"
    state_events: Annotated[
        StateEvents, Key("state transitions as span events, log events, or both", Choice(get_args(StateEvents)))
    ] = "span"
    segment_events: Annotated[
        int,
        Key("events on a connection's span, then a new linked span", Integer(16, 100_000), "a trace below 1 MB"),
    ] = 500
    segment_age: Annotated[
        float,
        Key(
            "age of a connection's span, then a new linked span",
            Duration(1.0),
            "long ones show early",
        ),
    ] = 5 * MINUTE
    trace_in_reply: Annotated[bool, Key("`trace=<id>` in the final 250, and in refusals of mail", Boolean())] = True
    keep: Annotated[
        tuple[str, ...],
        Key(
            "what is exported though OTEL_TRACES_SAMPLER drops it: mails that failed or lost a recipient, slow ones",
            Many(Choice(("errors", "slow"))),
        ),
    ] = ()
    slow: Annotated[float, Key("time beyond which a mail is slow, for `keep`", Duration())] = 5.0
    keep_rate: Annotated[Rate, Key("mails that `keep` may keep, per process", RateKind())] = Rate(20, 1.0)
    probes: Annotated[bool, Key("export spans of connections that sent nothing", Boolean())] = False
    message_id: Annotated[
        bool, Key("put the mail's Message-ID on its span; it may contain the name of a host or person", Boolean())
    ] = False


class StatusTable(Table, frozen=True, kw_only=True):
    """The HTTP side: livez, readyz, metrics, the page."""

    address: Annotated[
        Endpoint | None,
        Key(
            "where to listen, or `off`",
            ListenAddress(may_be_unix=False, may_be_off=True),
            "8080 and 9090 collide in pods",
        ),
    ] = Endpoint("127.0.0.1", 9925)
    allow: Annotated[
        tuple[Network, ...],
        Key("networks that may see the page and its API; probes and metrics are open to all", Many(NetworkKind())),
    ] = LOOPBACK_NETWORKS
    hosts: Annotated[
        tuple[str, ...],
        Key(
            "names by which browsers reach the page, beside IP addresses, localhost and `hostname`; "
            "others are refused, since a web page may have rebound them",
            Many(Text("a host name", HOST_NAME_PATTERN)),
        ),
    ] = ()
    trace_url: Annotated[
        str,
        Key(
            "where a backend shows a trace; the page links there",
            Text("an http or https URL with {trace_id} in it", r"https?://[^\s{}]+\{trace_id\}[^\s{}]*"),
            default="no link",
        ),
    ] = ""
    token: Annotated[
        Secret | None,
        Key(
            "anyone with it may retry, hold, release and expire queued messages on the page; without it the page is "
            "read-only",
            SecretText("16 to 200 printable ASCII characters without a space", r"[!-~]{16,200}"),
            secret=True,
        ),
    ] = None
    token_file: Annotated[
        Path | None, Key("file that holds it", FilePath(may_be_empty=True), must_be_readable=True)
    ] = None


class LogTable(Table, frozen=True, kw_only=True):
    """Log lines, to standard error."""

    format: Annotated[LogFormat, Key("`auto`: text on a terminal, else JSON", Choice(get_args(LogFormat)))] = "auto"
    level: Annotated[LogLevel, Key("least severe level that is logged", Choice(get_args(LogLevel)))] = "info"


def _own_name() -> str:
    name = os.uname().nodename
    return name if re.fullmatch(HOST_NAME_PATTERN, name) else "localhost"


class Settings(Table, frozen=True, kw_only=True):
    """All settings of one gateway, checked.

    Attributes:
        origins: by key path, where the value was set; defaults are missing.
        warnings: allowed but questionable settings, for the log at start.
    """

    hostname: Annotated[
        str,
        Key(
            "the gateway's name in greeting, EHLO and Received",
            Text("a host name", HOST_NAME_PATTERN),
            "RFC 5321 4.1.1.1",
            default="the machine's own name",
        ),
    ] = msgspec.field(default_factory=_own_name)
    workers: Annotated[int, Key("processes that share the listeners' ports", Integer(1, 256))] = 1
    listener: tuple[ListenerTable, ...] = (ListenerTable(),)
    limits: LimitsTable = LimitsTable()
    timeouts: TimeoutsTable = TimeoutsTable()
    delivery: DeliveryTable = DeliveryTable()
    upstream: tuple[UpstreamTable, ...] = ()
    limit: tuple[RateLimitTable, ...] = ()
    notify: tuple[NotifyTable, ...] = ()
    rewrite: RewriteTable = RewriteTable()
    spool: SpoolTable = SpoolTable()
    telemetry: TelemetryTable = TelemetryTable()
    status: StatusTable = StatusTable()
    log: LogTable = LogTable()

    origins: Mapping[str, str] = msgspec.field(default_factory=dict)
    warnings: tuple[str, ...] = ()


# The schema, read off the structures ---------------------------------------------------------------------------


class Tables(NamedTuple):
    """A list of tables, as [[listener]]."""

    item: type[Table]


Entry = Key | type[Table] | Tables

_NOT_SETTINGS: Final = frozenset({"origins", "warnings"})


def _entries(table: type[Table]) -> dict[str, Entry]:
    """The keys of a table."""
    entries: dict[str, Entry] = {}
    for name, annotation in table.__annotations__.items():
        if name in _NOT_SETTINGS:
            continue
        if isinstance(annotation, type) and issubclass(annotation, Table):
            entries[name] = annotation
        elif metadata := getattr(annotation, "__metadata__", None):
            entries[name] = metadata[0]
        else:
            entries[name] = Tables(get_args(annotation)[0])
    return entries


SCHEMA: Final[dict[type[Table], dict[str, Entry]]] = {
    table: _entries(table)
    for table in (
        Settings, ListenerTable, LimitsTable, TimeoutsTable, DeliveryTable, UpstreamTable, UpstreamTimeoutTable,
        RateLimitTable, NotifyTable, RewriteTable, SpoolTable, TelemetryTable, StatusTable, LogTable,
    )
}  # fmt: skip
