"""Target: header blocks and what telemetry makes of a peer's text. The input is a block, or any text.

Claimed: `inspect_header` counts and reads what a reading line by line finds; `replace_trace_headers` takes out every
trace field, and nothing else, and puts ours below our Received field; that field is well formed whatever a client
says; what is shown of a peer's text is bounded, can be encoded, and holds no control character and no mailbox that it
should not; a trace context that is taken is written back as it was.
"""

import re
from typing import Final

from otel_smtp.observing import TraceHeaders
from otel_smtp.smtp.received import (
    MAX_TRACE_VALUE_OCTETS,
    inspect_header,
    received_field,
    received_head,
    replace_trace_headers,
)
from otel_smtp.telemetry import propagation
from otel_smtp.telemetry.attributes import MAX_VALUE_CHARACTERS
from otel_smtp.telemetry.redaction import Addresses, ClientIp, Redaction, clean

_CARRIER: Final = {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01", "tracestate": "a=b"}
_REDACTIONS: Final = tuple(
    Redaction(addresses, client_ip, b"key") for addresses, client_ip in zip(Addresses, [*ClientIp] * 2, strict=False)
)
_CONTROLS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")
_NAME: Final = re.compile(rb"([^ \t:]*)[ \t]*:")


def run(data: bytes) -> None:
    """Try one block, and the same octets as text."""
    _try_block(data)
    text = data.decode("utf-8", "surrogateescape")
    _try_received(text)
    _try_text(text)


def _fields(block: bytes) -> list[tuple[bytes, bytes]]:
    """Each field's name in lower case and all of its octets, line by line; what is no field has no name."""
    fields: list[tuple[bytes, bytes]] = []
    for line in block.split(b"\n"):
        if line[:1] in (b" ", b"\t") and fields:
            name, octets = fields.pop()
            fields.append((name, octets + b"\n" + line))
            continue
        match = _NAME.match(line)
        fields.append((match[1].lower() if match is not None else b"", line))
    return fields


def _is_trace(name: bytes) -> bool:
    return name in (b"traceparent", b"tracestate")


def _end_of_own_field(block: bytes) -> int:
    """Where the Received field that the block begins with ends; 0 where it begins with another one."""
    end = 0
    for line in re.findall(rb"[^\n]*\n", block):
        if not line.startswith((b" ", b"\t") if end else b"Received:"):
            break
        end += len(line)
    return end


def _try_block(block: bytes) -> None:
    facts = inspect_header(block)
    fields = _fields(block)
    assert facts.hops == sum(name == b"received" for name, _ in fields)
    assert len(facts.traceparents) == min(2, sum(name == b"traceparent" for name, _ in fields))
    assert (facts.message_id is not None) == any(name == b"message-id" for name, _ in fields)
    for value in (*facts.traceparents, facts.tracestate):
        assert len(value) <= MAX_TRACE_VALUE_OCTETS
        assert "\n" not in value
        assert "\r" not in value
    assert replace_trace_headers(block, None) == block
    without = replace_trace_headers(block, {})
    left = _fields(without)
    assert not any(_is_trace(name) for name, _ in left), "a trace field stayed"
    kept = b"\n".join(octets for name, octets in fields if not _is_trace(name))
    # A last field without its line end takes the line end before it along, and leaves that to the line before.
    assert without in (kept, kept + b"\n"), "more than the trace fields was changed"
    assert replace_trace_headers(without, {}) == without
    top = b"".join(f"{name}: {value}\r\n".encode() for name, value in _CARRIER.items())
    place = _end_of_own_field(without)
    assert replace_trace_headers(block, _CARRIER) == without[:place] + top + without[place:]
    assert replace_trace_headers(block, _CARRIER, place) == without[:place] + top + without[place:]
    context = propagation.parse(TraceHeaders(facts.traceparents, facts.tracestate), with_state=True)
    if context is not None:
        again = propagation.from_carrier(propagation.carrier(context))
        assert again is not None
        assert (again.trace_id, again.span_id) == (context.trace_id, context.span_id)
        assert again.trace_state == context.trace_state


def _try_received(text: str) -> None:
    helo, _, peer = text.partition("\n")
    for word in ("ESMTP", "UTF8SMTP"):
        head = received_head(helo=helo, peer_host=peer, by="gw.example", with_protocol=word)
        octets = received_field(head, "id1", 0.0)
        lines = octets.split(b"\r\n")
        assert lines.pop() == b""
        assert lines[0].startswith(b"Received: from ")
        assert all(line.startswith(b" ") for line in lines[1:])
        assert len(lines) == 4
        assert not any(re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line) for line in lines)
        assert octets.isascii()
        assert inspect_header(octets).hops == 1


def _try_text(text: str) -> None:
    for shown in (clean(text), clean(text, 20)):
        assert len(shown) <= MAX_VALUE_CHARACTERS
        shown.encode()
        assert _CONTROLS.search(shown) is None
    for redaction in _REDACTIONS:
        for given in (
            redaction.text(text),
            redaction.mailbox(text),
            redaction.domain(text),
            redaction.host_name(text),
            redaction.ip(text),
            *redaction.user(text).values(),
        ):
            if given is not None:
                assert len(given) <= MAX_VALUE_CHARACTERS
                given.encode()
                assert _CONTROLS.search(given) is None
        if redaction.addresses in (Addresses.NONE, Addresses.DOMAIN):
            hidden = redaction.text(f"no such user <secret-name@there.example> {text}")
            assert "secret-name" not in hidden
