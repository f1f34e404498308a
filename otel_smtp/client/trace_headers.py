"""The trace context in a message: into an `email` message, or into one that is flattened already.

Always as W3C Trace Context, whatever propagators the application has set up: gateways read that in mail. They do not
read baggage, which has no business in a header block that strangers may see.
"""

import re
from email.message import Message
from typing import Any, Final, NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext

_TRACEPARENT: Final = "traceparent"
_TRACESTATE: Final = "tracestate"
# A header line has 78 characters (RFC 5322 2.1.1) and is folded at spaces only; the email package writes a longer word
# as an encoded one (RFC 2047), which readers of tracestate do not decode. One is for the comma.
_MAX_MEMBER_CHARACTERS: Final = 78 - len(f"{_TRACESTATE}: ") - 1

# Octets are read as Latin-1, one character each, so one set of patterns serves both kinds of message.
_LINE_END: Final = re.compile("\r\n|\r|\n")
# A field's name is printable US-ASCII without the colon (RFC 5322 2.2). A message that begins otherwise, with an mbox
# line or its body, has no header block to add to.
_FIRST_FIELD: Final = re.compile("[!-9;-~]+[ \t]*:")
_TRACE_FIELD: Final = re.compile("(?:\\A|[\r\n])(?:traceparent|tracestate)[ \t]*:", re.IGNORECASE)
_SIGNATURE_FIELD: Final = re.compile(
    "(?:\\A|[\r\n])(?:dkim-signature|domainkey-signature|arc-seal|arc-message-signature)[ \t]*:", re.IGNORECASE
)
_END_OF_HEADER: Final = "\r?\n\r?\n|\r\r"
_END_OF_TEXT_HEADER: Final = re.compile(_END_OF_HEADER)
_END_OF_BYTES_HEADER: Final = re.compile(_END_OF_HEADER.encode("ascii"))


def inject(message: "Message[Any, Any]", context: Context | None = None) -> None:
    """Set the `traceparent` and `tracestate` of `message` to the current span, replacing any it has.

    Call it within the span of the sending, of kind CLIENT if a service graph should show the edge. Without a valid span
    in `context` the message is left unchanged.

    Args:
        message: of the `email` package; `EmailMessage` is one.
        context: where the span is; the current context if None.

    Members of `tracestate` that do not fit into one header line are left out (W3C Trace Context 3.3.1.5 has the longest
    go first).
    """
    fields = _fields(trace.get_current_span(context).get_span_context())
    if not fields:
        return
    del message[_TRACEPARENT], message[_TRACESTATE]
    for name, value in fields:
        message[name] = value


class HeaderBlock(NamedTuple):
    """A flattened message's header block: whether trace headers may be added.

    Attributes:
        line_end: between its first two lines; "" without a header block.
        is_traced: it has a `traceparent` or `tracestate` already.
        is_signed: it carries a DKIM, DomainKeys or ARC signature (RFC 6376 3.5, RFC 8617 4.1).
    """

    line_end: str
    is_traced: bool
    is_signed: bool

    @property
    def may_be_extended(self) -> bool:
        """Whether a field on top changes nothing else about the message.

        A signed message is never touched, whichever fields its signature covers.
        """
        return bool(self.line_end) and not self.is_traced and not self.is_signed


def header_block(message: str | bytes) -> HeaderBlock:
    """Inspect the header block of a flattened message, and nothing behind it."""
    if isinstance(message, str):
        end = _END_OF_TEXT_HEADER.search(message)
        text = message if end is None else message[: end.end()]
    else:
        end_of_bytes = _END_OF_BYTES_HEADER.search(message)
        text = (message if end_of_bytes is None else message[: end_of_bytes.end()]).decode("latin-1")
    line_end = _LINE_END.search(text)
    if line_end is None or not _FIRST_FIELD.match(text):
        return HeaderBlock("", is_traced=False, is_signed=False)
    return HeaderBlock(
        line_end[0],
        is_traced=_TRACE_FIELD.search(text) is not None,
        is_signed=_SIGNATURE_FIELD.search(text) is not None,
    )


def trace_headers(span: SpanContext, line_end: str) -> str:
    """The trace headers of `span` as lines for the top of a header block; "" if `span` is not valid.

    Args:
        line_end: as the message has it.
    """
    # A line of tracestate for each member: together they may be longer than a line may be (RFC 5322 2.1.1).
    return "".join(f"{name}: {value}{line_end}".replace(", ", f",{line_end} ") for name, value in _fields(span))


def _fields(span: SpanContext) -> list[tuple[str, str]]:
    if not span.is_valid:
        return []
    fields = [(_TRACEPARENT, f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags & 0xFF:02x}")]
    members = [f"{key}={value}" for key, value in span.trace_state.items()]
    fitting = [member for member in members if len(member) <= _MAX_MEMBER_CHARACTERS]
    if fitting:
        fields.append((_TRACESTATE, ", ".join(fitting)))
    return fields
