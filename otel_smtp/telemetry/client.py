"""Trace context into a message that an application is about to send: the other end of `propagation`.

Always as W3C Trace Context, whatever propagators the application has set up: that is what gateways read in mail, and
baggage, which they would not, has no business in a header block that strangers may see.
"""

from email.message import Message
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context

_TRACEPARENT: Final = "traceparent"
_TRACESTATE: Final = "tracestate"
# A header line has 78 characters (RFC 5322 2.1.1) and is folded at spaces only; the email package writes a longer word
# as an encoded one (RFC 2047), in which no reader of tracestate looks. One is for the comma.
_MAX_MEMBER_CHARACTERS: Final = 78 - len(f"{_TRACESTATE}: ") - 1


def inject(message: "Message[Any, Any]", context: Context | None = None) -> None:
    """Give `message` the current span as `traceparent` and `tracestate`, in place of what it has of these.

    Call it within the span that stands for the sending, of kind CLIENT if a service graph is to show the edge. Without
    a valid span in `context` the message is left as it is.

    Args:
        message: of the `email` package; `EmailMessage` is one.
        context: where the span is; the current context if None.

    Members of `tracestate` that do not fit into one header line are left out (W3C Trace Context 3.3.1.5 has the longest
    go first).
    """
    span = trace.get_current_span(context).get_span_context()
    if not span.is_valid:
        return
    del message[_TRACEPARENT], message[_TRACESTATE]
    message[_TRACEPARENT] = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags & 0xFF:02x}"
    members = [f"{key}={value}" for key, value in span.trace_state.items()]
    fitting = [member for member in members if len(member) <= _MAX_MEMBER_CHARACTERS]
    if fitting:
        message[_TRACESTATE] = ", ".join(fitting)
