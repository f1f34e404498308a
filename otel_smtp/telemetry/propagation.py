"""Trace context in and out of mail: trust, parsing and writing (W3C Trace Context, level 2).

The sender writes a message's header block. A trusted stranger could attach mails to any trace, switch tracing off by a
flag, or pass 8 KiB of `tracestate` through us. So the listener's policy decides whose context becomes a parent,
`tracestate` is dropped unless its sender is trusted, and baggage is not read at all.
"""

import ipaddress
import re
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache, partial
from typing import Final, NamedTuple

from otel_smtp.observing import TraceHeaders

SAMPLED: Final = 0x01
RANDOM: Final = 0x02  # level 2: the trace id's last 7 octets are random

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"

# 55 octets in version 00; a later version may add fields, and 128 is more than twice of what is known.
MAX_TRACEPARENT_CHARACTERS: Final = 128
# The least that a participant must pass on (3.3.1.5); we pass on no more.
MAX_TRACESTATE_CHARACTERS: Final = 512

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?")
_TRACESTATE_KEY: Final = r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
_TRACESTATE_MEMBER: Final = re.compile(
    rf"{_TRACESTATE_KEY}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
_MAX_TRACESTATE_MEMBERS: Final = 32


class TraceContext(NamedTuple):
    """A span's identity, ours or foreign: the content of a traceparent."""

    trace_id: int
    span_id: int
    flags: int
    is_remote: bool = False
    trace_state: str = ""

    @property
    def trace_id_hex(self) -> str:
        """32 hexadecimal digits."""
        return f"{self.trace_id:032x}"

    @property
    def span_id_hex(self) -> str:
        """16 hexadecimal digits."""
        return f"{self.span_id:016x}"


_context: Final = partial(tuple.__new__, TraceContext)  # the constructor of a named tuple is a function in Python


class InboundPolicy(StrEnum):
    """A listener's policy for a message's trace context."""

    AUTO = "auto"  # parent for loopback and authenticated clients, link else
    PARENT = "parent"  # the transaction joins the application's trace
    LINK = "link"  # the transaction stays below its connection and links to the application
    IGNORE = "ignore"


def decide(policy: InboundPolicy, *, client: str, is_local: bool, is_authenticated: bool) -> InboundPolicy:
    """What `policy` means for one client; never AUTO.

    Args:
        client: its IP address, from a trusted PROXY header if there is one.
        is_local: it came over a unix socket.
    """
    if policy is not InboundPolicy.AUTO:
        return policy
    return InboundPolicy.PARENT if is_authenticated or is_local or is_loopback(client) else InboundPolicy.LINK


@lru_cache(maxsize=1024)  # asked for every message of every client
def is_loopback(host: str) -> bool:
    """Whether `host` is an IP address of this machine's loopback network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def parse(headers: TraceHeaders, *, with_state: bool) -> TraceContext | None:
    """The context of a header block; None if it has none, two, or a malformed one.

    Args:
        with_state: take `tracestate` too: for trusted senders only.
    """
    if len(headers.traceparents) != 1:
        return None
    return parse_traceparent(headers.traceparents[0], checked_tracestate(headers.tracestate) if with_state else "")


def parse_traceparent(text: str, trace_state: str = "") -> TraceContext | None:
    """A `traceparent` value (W3C Trace Context 3.2) with its state, or None."""
    if len(text) > MAX_TRACEPARENT_CHARACTERS:
        return None
    match = _TRACEPARENT.fullmatch(text.strip(" \t"))
    if match is None:
        return None
    version, trace_digits, span_digits, flags, rest = match.groups()
    # "Version 255 is invalid." Version 00 ends with its flags; a later one may go on behind a dash.
    if version == "ff" or (version == "00" and rest is not None):
        return None
    trace_id, span_id = int(trace_digits, 16), int(span_digits, 16)
    if not trace_id or not span_id:
        return None
    return TraceContext(trace_id, span_id, int(flags, 16) & (SAMPLED | RANDOM), True, trace_state)


def checked_tracestate(text: str) -> str:
    """`text` if it is a `tracestate` list within bounds (W3C Trace Context 3.3.1), else ""."""
    if not text or len(text) > MAX_TRACESTATE_CHARACTERS:
        return ""
    members = [member.strip(" \t") for member in text.split(",")]
    members = [member for member in members if member]
    keys = {member.partition("=")[0] for member in members}
    if len(members) > _MAX_TRACESTATE_MEMBERS or len(keys) != len(members):
        return ""
    return ",".join(members) if all(_TRACESTATE_MEMBER.fullmatch(member) for member in members) else ""


class Carrier(dict[str, str]):
    """A context as header fields, which need not be parsed while this process has their message.

    Attributes:
        context: the one in these fields.
    """

    __slots__ = ("context",)

    context: TraceContext


def carrier(context: TraceContext) -> Mapping[str, str]:
    """`context` as header fields, names in lower case."""
    before, behind = around_span_id(context)
    fields = Carrier()
    fields[TRACEPARENT] = f"{before}{context.span_id_hex}{behind}"
    if state := context.trace_state:
        fields[TRACESTATE] = state
    fields.context = context
    return fields


def around_span_id(context: TraceContext) -> tuple[str, str]:
    """The text before and behind the span's id in the traceparent of `context`, and of each span that has all but
    its id from that one (W3C Trace Context 3.2.2)."""
    return f"00-{context.trace_id_hex}-", f"-{context.flags & 0xFF:02x}"


def from_carrier(fields: Mapping[str, str]) -> TraceContext | None:
    """The context that `carrier` wrote earlier, into our own spool: its state is trusted."""
    if fields.__class__ is Carrier:
        trace_id, span_id, flags, _, trace_state = fields.context
        if not trace_state:
            return _context((trace_id, span_id, flags & (SAMPLED | RANDOM), True, ""))
    traceparent = fields.get(TRACEPARENT)
    if traceparent is None:
        return None
    state = fields.get(TRACESTATE)
    return parse_traceparent(traceparent, checked_tracestate(state) if state else "")
