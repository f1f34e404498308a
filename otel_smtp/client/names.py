"""The names in an application's mail spans, each defined once.

Registered names wherever one fits; those under `smtp.` mean what they mean on the gateway's own spans.
"""

from typing import Final, NamedTuple

SPAN: Final = "smtp.send"
RECIPIENT_EVENT: Final = "smtp.recipient"

MAX_VALUE_CHARACTERS: Final = 256
MAX_DOMAINS: Final = 10  # an array attribute; the gateway keeps as many
MAX_RECIPIENT_EVENTS: Final = 50  # well below the 128 events at which an SDK begins to drop the first


class ClientAttribute(NamedTuple):
    """One attribute, as the README describes it."""

    name: str
    type: str
    when: str
    example: str


ATTRIBUTES: Final[dict[str, ClientAttribute]] = {}


def _attribute(name: str, type_: str, when: str, example: str) -> str:
    ATTRIBUTES[name] = ClientAttribute(name, type_, when, example)
    return name


SERVER_ADDRESS: Final = _attribute("server.address", "string", "always: as the application named it", "127.0.0.1")
SERVER_PORT: Final = _attribute("server.port", "int", "over TCP", "2525")
NETWORK_PEER_ADDRESS: Final = _attribute("network.peer.address", "string", "over TCP, while connected", "127.0.0.1")
NETWORK_PEER_PORT: Final = _attribute("network.peer.port", "int", "over TCP, while connected", "2525")
NETWORK_TRANSPORT: Final = _attribute("network.transport", "string", "always: tcp, unix", "tcp")
NETWORK_PROTOCOL_NAME: Final = _attribute("network.protocol.name", "string", "always: smtp, lmtp", "smtp")
OUTCOME: Final = _attribute(
    "smtp.outcome",
    "string",
    "always: relayed, partly_relayed, refused, deferred, aborted (the connection failed, or the message was given up, "
    "before its content), unknown (the connection was lost after it)",
    "relayed",
)
ERROR_TYPE: Final = _attribute(
    "error.type", "string", "unless every recipient was accepted: the reply code, else the exception's class", "550"
)
REPLY_CODE: Final = _attribute("smtp.reply.code", "int", "where the server's reply decided", "250")
REPLY_ENHANCED_CODE: Final = _attribute("smtp.reply.enhanced_code", "string", "where the reply had one", "2.0.0")
REPLY_TEXT: Final = _attribute(
    "smtp.reply.text", "string", "with the code; without mailboxes, unless addresses = full", "Ok: queued as 4XyZ12"
)
REPLY_TRACE_ID: Final = _attribute(
    "smtp.reply.trace_id",
    "string",
    "where the reply ends in trace=…: the gateway's trace of this message, another one than this span's where the "
    "message went without a traceparent",
    "0af7651916cd43dd8448eb211c80319c",
)
FAILURE_REASON: Final = _attribute(
    "smtp.failure.reason",
    "string",
    "where the connection failed: in the words of the exception",
    "Connection unexpectedly closed",
)
RECIPIENT_COUNT: Final = _attribute(
    "smtp.transaction.recipient_count", "int", "always: recipients that the server accepted", "2"
)
RECIPIENTS_REFUSED: Final = _attribute(
    "smtp.transaction.recipients_refused", "int", "always: recipients refused with 5xx", "0"
)
RECIPIENTS_DEFERRED: Final = _attribute(
    "smtp.transaction.recipients_deferred", "int", "always: recipients refused with 4xx", "0"
)
MESSAGE_SIZE: Final = _attribute("smtp.message.size", "int", "from DATA on: octets of the content", "20480")
MESSAGE_SIGNED: Final = _attribute(
    "smtp.message.signed", "boolean", "true where a DKIM or ARC signature kept the trace headers out", "true"
)
MAIL_FROM_DOMAIN: Final = _attribute(
    "smtp.mail.from.domain", "string", 'unless addresses = none; "" for the null path', "shop.example"
)
MAIL_FROM_ADDRESS: Final = _attribute("smtp.mail.from.address", "string", "addresses = full", "news@shop.example")
RCPT_DOMAIN: Final = _attribute(
    "smtp.rcpt.domain",
    "string",
    "unless addresses = none; where all recipients share one; also on events",
    "there.example",
)
RCPT_DOMAINS: Final = _attribute(
    "smtp.rcpt.domains",
    "string[]",
    "unless addresses = none: of the recipients that were asked for, at most 10",
    "there.example",
)
RCPT_ADDRESSES: Final = _attribute(
    "smtp.rcpt.addresses",
    "string[]",
    "addresses = full: of the recipients that were asked for, at most 10",
    "bob@there.example",
)
RCPT_ADDRESS: Final = _attribute("smtp.rcpt.address", "string", "on events, addresses = full", "bob@there.example")
RECIPIENT_FATE: Final = _attribute("smtp.recipient.fate", "string", "on events: refused, deferred", "refused")


def table() -> str:
    """All attributes as a Markdown table."""
    lines = ["| Attribute | Type | When present | Example |", "| --- | --- | --- | --- |"]
    lines += [f"| `{one.name}` | {one.type} | {one.when} | `{one.example}` |" for one in ATTRIBUTES.values()]
    return "\n".join(lines)
