"""The span of one message that an application sends, from its first command to the deciding reply.

Facts are noted while the client library works, and turned into attributes once, at the end. The caller must catch every
exception raised here, so that tracing never disturbs a mail.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from . import names
from .reply_words import HIDDEN, Shown, shown_words
from .trace_headers import header_block, trace_headers

_ENHANCED: Final = re.compile(r"[245]\.\d{1,3}\.\d{1,3}(?= |$)")
_TRACE_IN_REPLY: Final = re.compile(r"\btrace=([0-9a-f]{32})\b")
_DOMAIN: Final = re.compile(r"@([\w.\[\]:-]*)[^@]*$")


class AddressDetail(StrEnum):
    """How much of a mailbox the spans show."""

    NONE = "none"
    DOMAIN = "domain"  # the part behind the @
    FULL = "full"


_SHOWN: Final = {
    AddressDetail.NONE: Shown(mailbox=lambda _: HIDDEN, ip=str, has_domains=False),
    AddressDetail.DOMAIN: Shown(mailbox=lambda mailbox: f"...@{_domain_of(mailbox)}", ip=str, has_domains=True),
}


class ServerReply(NamedTuple):
    """A server's reply: its code, and its text, lines separated by "\\n", without the codes of the lines."""

    code: int
    text: str

    @property
    def is_positive(self) -> bool:
        """Whether the server accepted the command."""
        return self.code < 400

    @property
    def fate(self) -> str:
        """The fate of a recipient or a message after a negative reply (RFC 5321 4.2.1)."""
        return "refused" if self.code >= 500 else "deferred"


class MailServer(NamedTuple):
    """The server that the application is connected to.

    Attributes:
        address: as the application named it; a path for a unix socket.
        port: None for a unix socket.
        peer: address and port of the other end; None if there is none.
        protocol: smtp, lmtp.
    """

    address: str
    port: int | None
    peer: tuple[str, int] | None
    protocol: str = "smtp"


@dataclass(slots=True)
class ClientTransaction:
    """The facts of one mail transaction.

    Attributes:
        started_ns: since the epoch.
        refused: recipients, each with the reply that refused or deferred it.
        octets: of the content; None until it is about to be sent.
        reply: the last reply to the content.
    """

    started_ns: int = field(default_factory=time.time_ns)
    sender: str | None = None
    accepted: list[str] = field(default_factory=list)
    refused: list[tuple[str, ServerReply]] = field(default_factory=list)
    octets: int | None = None
    reply: ServerReply | None = None

    def note_recipient(self, address: str, reply: ServerReply) -> None:
        """Keep what the server said to RCPT."""
        if reply.is_positive:
            self.accepted.append(address)
        else:
            self.refused.append((address, reply))


class _Conclusion(NamedTuple):
    """How a transaction ended.

    Attributes:
        reply: the one that decided; None if none did.
        error_type: None if every recipient was accepted.
        reason: in words, if no reply decided.
    """

    outcome: str
    reply: ServerReply | None = None
    error_type: str | None = None
    reason: str | None = None


class MessageSpan:
    """A span that is open while a message is sent.

    Args:
        reply_in: the reply that an exception of the client library carries; None if it carries none.
    """

    def __init__(
        self,
        tracer: Tracer,
        transaction: ClientTransaction,
        server: MailServer,
        *,
        addresses: AddressDetail,
        reply_in: Callable[[BaseException], ServerReply | None],
    ) -> None:
        self.transaction = transaction
        self._addresses = addresses
        self._reply_in = reply_in
        self._is_signed = False
        self._span: Span = tracer.start_span(
            names.SPAN, kind=SpanKind.CLIENT, start_time=transaction.started_ns, attributes=_server_attributes(server)
        )

    def with_context(self, message: object) -> object:
        """The message with this span's context on top of its header block.

        Returns:
            `message` itself if it has trace headers, is signed, has no header block or is neither str nor bytes.
        """
        if not isinstance(message, str | bytes):
            return message
        block = header_block(message)
        self._is_signed = block.is_signed and not block.is_traced
        if not block.may_be_extended:
            return message
        fields = trace_headers(self._span.get_span_context(), block.line_end)
        return fields + message if isinstance(message, str) else fields.encode("ascii", "replace") + message

    def in_context(self) -> Context:
        """The current context with this span as its span."""
        return trace.set_span_in_context(self._span)

    def end(self, error: BaseException | None) -> None:
        """Describe the outcome of the message, and end the span even if that fails.

        Args:
            error: what the sending raised.
        """
        try:
            if self._span.is_recording():
                self._describe(self._conclude(error))
        finally:
            self._span.end()

    def _conclude(self, error: BaseException | None) -> _Conclusion:
        transaction = self.transaction
        reply = transaction.reply if error is None else self._reply_in(error)
        if reply is not None and not reply.is_positive:
            return _Conclusion(reply.fate, reply, str(reply.code))
        if error is not None:
            outcome = "aborted" if transaction.octets is None else "unknown"
            # Only errors of the system or the connection: the text of another exception may quote the message.
            reason = _shown(str(error), self._addresses) if isinstance(error, OSError) else ""
            return _Conclusion(outcome, None, _qualified_name(type(error)), reason or None)
        if transaction.refused:
            return _Conclusion("partly_relayed", reply, str(transaction.refused[0][1].code))
        return _Conclusion("relayed", reply)

    def _describe(self, conclusion: _Conclusion) -> None:
        transaction, span = self.transaction, self._span
        fates = [reply.fate for _, reply in transaction.refused]
        span.set_attributes(
            {
                names.OUTCOME: conclusion.outcome,
                names.RECIPIENT_COUNT: len(transaction.accepted),
                names.RECIPIENTS_REFUSED: fates.count("refused"),
                names.RECIPIENTS_DEFERRED: fates.count("deferred"),
                **self._envelope(),
            }
        )
        if transaction.octets is not None:
            span.set_attribute(names.MESSAGE_SIZE, transaction.octets)
        if self._is_signed:
            span.set_attribute(names.MESSAGE_SIGNED, True)
        if conclusion.reply is not None:
            span.set_attributes(self._reply(conclusion.reply))
        if conclusion.reason is not None:
            span.set_attribute(names.FAILURE_REASON, conclusion.reason)
        for address, reply in transaction.refused[: names.MAX_RECIPIENT_EVENTS]:
            recipient = {names.RECIPIENT_FATE: reply.fate, **self._mailbox(address), **self._reply(reply)}
            span.add_event(names.RECIPIENT_EVENT, recipient)
        if conclusion.error_type is not None:
            span.set_attribute(names.ERROR_TYPE, conclusion.error_type)
            span.set_status(Status(StatusCode.ERROR, _description(conclusion)))

    def _envelope(self) -> dict[str, Any]:
        """Sender and recipients, as far as they may be shown."""
        attributes: dict[str, Any] = {}
        sender = self.transaction.sender
        recipients = [*self.transaction.accepted, *(address for address, _ in self.transaction.refused)]
        if self._addresses is not AddressDetail.NONE:
            domains = list(dict.fromkeys(_domain_of(recipient) for recipient in recipients))
            if domains:
                attributes[names.RCPT_DOMAINS] = domains[: names.MAX_DOMAINS]
            if len(domains) == 1:
                attributes[names.RCPT_DOMAIN] = domains[0]
            if sender is not None:
                attributes[names.MAIL_FROM_DOMAIN] = _domain_of(sender)
        if self._addresses is AddressDetail.FULL:
            if recipients:
                attributes[names.RCPT_ADDRESSES] = [_clean(one) for one in recipients[: names.MAX_DOMAINS]]
            if sender is not None:
                attributes[names.MAIL_FROM_ADDRESS] = _clean(sender)
        return attributes

    def _mailbox(self, address: str) -> dict[str, str]:
        shown: dict[str, str] = {}
        if self._addresses is not AddressDetail.NONE:
            shown[names.RCPT_DOMAIN] = _domain_of(address)
        if self._addresses is AddressDetail.FULL:
            shown[names.RCPT_ADDRESS] = _clean(address)
        return shown

    def _reply(self, reply: ServerReply) -> dict[str, Any]:
        lines = reply.text.split("\n")
        code = _ENHANCED.match(lines[0])
        text = " ".join(_ENHANCED.sub("", line, count=1).strip() for line in lines)
        attributes: dict[str, Any] = {names.REPLY_CODE: reply.code, names.REPLY_TEXT: _shown(text, self._addresses)}
        if code is not None:
            attributes[names.REPLY_ENHANCED_CODE] = code[0]
        if (trace_id := _TRACE_IN_REPLY.search(reply.text)) is not None:
            attributes[names.REPLY_TRACE_ID] = trace_id[1]
        return attributes


def _server_attributes(server: MailServer) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        names.SERVER_ADDRESS: server.address,
        names.NETWORK_TRANSPORT: "unix" if server.port is None else "tcp",
        names.NETWORK_PROTOCOL_NAME: server.protocol,
    }
    if server.port is not None:
        attributes[names.SERVER_PORT] = server.port
    if server.peer is not None:
        attributes[names.NETWORK_PEER_ADDRESS], attributes[names.NETWORK_PEER_PORT] = server.peer
    return attributes


def _description(conclusion: _Conclusion) -> str | None:
    """The status description: few different ones, so that backends can group by it."""
    if conclusion.reply is None:
        return conclusion.reason or conclusion.error_type
    code = _ENHANCED.match(conclusion.reply.text)
    return f"{conclusion.reply.code} {code[0]}" if code is not None else str(conclusion.reply.code)


def _domain_of(address: str) -> str:
    """The domain or address literal behind the @; "" without an @."""
    found = _DOMAIN.search(address)
    return "" if found is None else _clean(found[1].lower())


def _shown(text: str, addresses: AddressDetail) -> str:
    """A server's or library's words: all of them for `full`, otherwise only those recognised as harmless, see
    `reply_words`.

    Cut before they are read, to bound the work, and at double the limit, so that no half of an address is left at the
    cut.
    """
    if addresses is not AddressDetail.FULL:
        text = shown_words(text[: 2 * names.MAX_VALUE_CHARACTERS], _SHOWN[addresses])
    return _clean(text)


def _clean(text: str) -> str:
    """At most 256 characters, without control characters, invisible ones and lone surrogates."""
    return "".join(one if one.isprintable() else "\ufffd" for one in text[: names.MAX_VALUE_CHARACTERS])


def _qualified_name(error: type[BaseException]) -> str:
    return error.__qualname__ if error.__module__ == "builtins" else f"{error.__module__}.{error.__qualname__}"
