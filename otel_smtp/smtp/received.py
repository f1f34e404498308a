"""The header block of a message: what it says of hops and traces."""

import re
from dataclasses import dataclass
from typing import Final

_FIELD: Final = re.compile(
    rb"^(received|traceparent|tracestate|message-id)[ \t]*:((?:[^\r\n]|\r\n[ \t])*)", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class HeaderFacts:
    """What is read out of a header block.

    Attributes:
        hops: Received fields (RFC 5321 6.3).
        traceparents: values of traceparent fields, unfolded, at most two: two are ignored as one forged.
        tracestate: the value of the first tracestate field, "" where none.
        message_id: the value of the first Message-ID field, None where none.
    """

    hops: int = 0
    traceparents: tuple[str, ...] = ()
    tracestate: str = ""
    message_id: str | None = None


def inspect_header(block: bytes) -> HeaderFacts:
    """Read the facts out of a header block, in one pass."""
    hops = 0
    traceparents: list[str] = []
    tracestate = ""
    message_id: str | None = None
    for match in _FIELD.finditer(block):
        name = match[1].lower()
        if name == b"received":
            hops += 1
            continue
        value = match[2].replace(b"\r\n", b"").strip().decode("ascii", "replace")
        if name == b"traceparent":
            if len(traceparents) < 2:
                traceparents.append(value)
        elif name == b"tracestate":
            tracestate = tracestate or value
        elif message_id is None:
            message_id = value
    return HeaderFacts(hops, tuple(traceparents), tracestate, message_id)
