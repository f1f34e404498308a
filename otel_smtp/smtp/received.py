"""The header block of mail in transit: our Received field, the hop count, trace headers in and out.

Theory of operation
-------------------
The block is searched, never parsed: whole-block `lower`, `find` and `count` cost microseconds, a loop over lines tens
of them. A field begins at the start of the block or behind an LF, with its name in any case, blanks and a colon (the
blanks before the colon are RFC 5322 4.5's obsolete form, which readers must understand). A line that begins with a
blank belongs to the field before it.

A bare LF counts as a line end here although content normally has none left: a later reader may take it for one, and
would then see a trace header behind it.

Only the trace headers are ever changed; no octet of another field is touched.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Final, NamedTuple

from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.paths import address_literal, is_address_literal, is_domain

MAX_TRACE_VALUE_OCTETS: Final = 512
"""Longest trace header value to read; W3C Trace Context 3.3.1.5 demands at least this much for tracestate."""

RECEIVED_TAIL_OCTETS: Final = 72
"""Length of our Received field behind its head: an id of 32 digits, the date, CRLF; UTF8SMTP is three longer than
ESMTP.
"""

TRACEPARENT_FIELD_OCTETS: Final = 70
"""Length of a traceparent field (W3C Trace Context 3.2.2) with its CRLF."""

MAX_MESSAGE_ID_OCTETS: Final = 998
"""Longest Message-ID to read: a line of RFC 5322 2.1.1."""

# Each pattern is for the lower-case block with an LF put in front; a match begins with the LF before the field and ends
# before the field's own last LF, so removing it leaves whole lines. Literal beginnings and loops whose end the next
# character decides keep the search fast and linear.
_BODY = rb"[ \t]*:([^\n]*(?:\n[ \t](?s:.)*?(?=\n(?![ \t])|\Z))?)"  # (?:...)* would store one position per folded line
_RECEIVED = re.compile(rb"\nreceived[ \t]*:")
_TRACEPARENT = re.compile(rb"\ntraceparent" + _BODY)
_TRACESTATE = re.compile(rb"\ntracestate" + _BODY)
_TRACE_FIELD = re.compile(rb"\ntrace(?:parent|state)" + _BODY)
_MESSAGE_ID = re.compile(rb"\nmessage-id" + _BODY)

# Our own, as `received_head` writes it: a few lines.
_FIRST_RECEIVED = re.compile(rb"Received:[^\n]*\n(?:[ \t][^\n]*\n)*")

# Octets to search, as numbers: for bytes, `in` first tries to read them as a number and recovers from the error.
_CR: Final = 0x0D
_LF: Final = 0x0A

_ATOM = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+")
_WORDS = re.compile(r"[A-Za-z0-9 ,:+._-]+")  # of a date, of a TLS comment
_FIELD_NAME = re.compile(r"[!-9;-~]+")  # ftext (RFC 5322 2.2)
_MOST_IN_A_FIELD: Final = 998  # RFC 5322 2.1.1

_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_EPOCH: Final = date(1970, 1, 1).toordinal()
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class HeaderFacts(NamedTuple):
    """The facts of a header block that the gateway uses.

    Attributes:
        hops: number of Received fields.
        traceparents: the values of the traceparent fields, unfolded, not yet validated, at most two: with a second one,
            none is trusted. A value that is too long or not ASCII is "".
        tracestate: the value of the first tracestate field, as above; "" without one.
        message_id: the value of the first Message-ID field, with its angle brackets; None without one. It comes from
            the client and may hold any character.
    """

    hops: int = 0
    traceparents: tuple[str, ...] = ()
    tracestate: str = ""
    message_id: str | None = None


# A NamedTuple's own constructor is a function in Python; each mail has one.
_new: Final = tuple.__new__


def with_protocol(*, is_extended: bool, is_lmtp: bool, is_tls: bool, is_authenticated: bool, is_utf8: bool) -> str:
    """The protocol in Received's "with" clause (RFC 3848, RFC 6531 4.3; IANA "Mail Transmission Types").

    Args:
        is_extended: the client greeted with EHLO, not with HELO.
        is_lmtp: it greeted with LHLO.
        is_utf8: MAIL of this message had SMTPUTF8.
    """
    if not is_extended and not is_lmtp:
        return "SMTP"  # without extensions there is no AUTH, and no registered word for TLS
    prefix = "UTF8" if is_utf8 else "" if is_lmtp else "E"
    return f"{prefix}{'LMTP' if is_lmtp else 'SMTP'}{'S' if is_tls else ''}{'A' if is_authenticated else ''}"


@lru_cache(maxsize=256)  # the many connections of an application share it
def received_head(
    *, helo: str, peer_host: str, by: str, with_protocol: str, tls: str | None = None, is_anonymous: bool = False
) -> bytes:
    """The part of our Received field that is the same for all messages of a session (RFC 5321 4.4), folded.

    Only valid tokens go in, so that no client can end the field or forge another one: a greeting name that is no domain
    or literal is replaced by the client's address.

    Args:
        helo: the client's name as in its greeting.
        peer_host: the client's IP address; anything else (the path of a unix socket) becomes "(local)".
        by: our own host name.
        with_protocol: see `with_protocol`.
        tls: version and cipher, for people.
        is_anonymous: leave out the client's name and address.

    Raises:
        LocalProtocolError: one of our own tokens is malformed.
    """
    host = _peer(peer_host)
    if is_anonymous:
        # RFC 5321 4.4 demands a from clause: ours, as if the message began here.
        helo, host = by, ""
    if not (helo.isascii() and (is_domain(helo) or is_address_literal(helo))):
        helo = host or "unknown"
    for word, pattern in ((with_protocol, _ATOM), (tls or "-", _WORDS)):
        if pattern.fullmatch(word) is None:
            raise LocalProtocolError(f"malformed word for the Received field: {word!r}")
    if not _is_own_name(by):
        raise LocalProtocolError(f"not a host name for the Received field: {by!r}")
    tls_comment = f" ({tls})" if tls else ""
    return (f"Received: from {helo} ({host or 'local'})\r\n by {by} with {with_protocol}{tls_comment}\r\n id ").encode()


def received_field(head: bytes, identifier: str, unix_seconds: float) -> bytes:
    """Our Received field for the top of a message, with its CRLF.

    Args:
        head: the result of `received_head`.
        identifier: the message's id with us: an atom: letters, digits and a few others.
        unix_seconds: now, since 1970-01-01 00:00 UTC.

    Raises:
        LocalProtocolError: the identifier is malformed.
    """
    if not (identifier.isascii() and identifier.isalnum()) and _ATOM.fullmatch(identifier) is None:
        raise LocalProtocolError(f"malformed word for the Received field: {identifier!r}")
    return b"".join((head, identifier.encode(), _tail_of_second(int(unix_seconds))))


def inspect_header(block: bytes) -> HeaderFacts:
    """Count hops, and read trace headers and Message-ID.

    Args:
        block: the header lines, each with its line end, without the empty line behind them; b"" for none.
    """
    lower = b"\n" + block.lower()
    hops = 0
    traceparents: Sequence[str] = ()
    tracestates: Sequence[str] = ()
    message_id = None
    # Testing whether a field may be there costs a tenth of searching the whole block with a pattern.
    if (start := lower.find(b"\nreceived")) >= 0:
        hops = len(_RECEIVED.findall(lower, start))
    if lower.find(b"\ntrace") >= 0:
        traceparents = _trace_values(block, lower, b"\ntraceparent", _TRACEPARENT, 2)
        tracestates = _trace_values(block, lower, b"\ntracestate", _TRACESTATE, 1)
    if (start := lower.find(b"\nmessage-id")) >= 0 and (field := _MESSAGE_ID.search(lower, start)) is not None:
        message_id = _value(block, field)[:MAX_MESSAGE_ID_OCTETS].decode("utf-8", "replace")
    return _new(HeaderFacts, (hops, tuple(traceparents), tracestates[0] if tracestates else "", message_id))


def replace_trace_headers(block: bytes, carrier: Mapping[str, str] | None, own_octets: int = 0) -> bytes:
    """Replace every traceparent and tracestate field of `block` by those of `carrier`: placed below the Received field
    that it begins with, which stays first (RFC 5321 4.4), or on top if it begins with another field, as our own notices
    do.

    Args:
        block: as for `inspect_header`.
        carrier: fields by name, as a propagator writes them; empty: only remove; None: leave the block unchanged.
            Values unfit for a header line are left out: a lost trace is better than a lost mail.
        own_octets: length of that Received field; 0: search for it.
    """
    if carrier is None:
        return block
    lower = block.lower()
    if b"\ntrace" in lower or lower.startswith(b"trace"):
        block = _without(block, _TRACE_FIELD.finditer(b"\n" + lower))
    fields = ""
    for name, value in carrier.items():
        is_text = value.__class__ is str and len(value) <= _MOST_IN_A_FIELD
        if is_text and value.isascii() and value.isprintable() and _is_field_name(name):
            fields += f"{name}: {value}\r\n"
    if not fields:
        return block
    place = own_octets
    if not place and (own := _FIRST_RECEIVED.match(block)) is not None:
        place = own.end()
    return b"".join((block[:place], fields.encode("ascii"), block[place:]))


@lru_cache(maxsize=4096)
def _peer(host: str) -> str:
    """The address literal of `host`; "" if it is no IP address."""
    try:
        return address_literal(host)
    except ValueError:
        return ""


@lru_cache(maxsize=64)
def _is_field_name(name: str) -> bool:
    return _FIELD_NAME.fullmatch(name) is not None


@lru_cache(maxsize=16)
def _is_own_name(name: str) -> bool:
    return name.isascii() and (is_domain(name) or is_address_literal(name))


@lru_cache(maxsize=4)
def _tail_of_second(unix_seconds: int) -> bytes:
    """The end of our Received field, behind the id."""
    return f";\r\n {rfc5322_date(unix_seconds)}\r\n".encode("ascii")


def rfc5322_date(unix_seconds: int) -> str:
    """A second since 1970-01-01 00:00 UTC as an RFC 5322 3.3 date-time in UTC: "Thu, 1 Jan 1970 00:00:00 +0000"."""
    days, second_of_day = divmod(unix_seconds, 86400)
    hour, second_of_hour = divmod(second_of_day, 3600)
    minute, second = divmod(second_of_hour, 60)
    day = date.fromordinal(_EPOCH + days)
    return (
        f"{_DAYS[day.weekday()]}, {day.day} {_MONTHS[day.month - 1]} {day.year:04}"
        f" {hour:02}:{minute:02}:{second:02} +0000"
    )


def _without(block: bytes, fields: Iterable[re.Match[bytes]]) -> bytes:
    block = b"\n" + block
    kept = []
    position = 0
    for field in fields:
        kept.append(block[position : field.start()])
        position = field.end()
    # A removed last field without LF took the LF before it, which belongs to the line before.
    kept.append(block[position:] or b"\n")
    return b"".join(kept)[1:]


def _value(block: bytes, field: re.Match[bytes]) -> bytes:
    """The unfolded value (RFC 5322 2.2.3) of a field found in the copy, which has one more octet in front."""
    start, end = field.span(1)
    value = block[start - 1 : end - 1].strip(b" \t\r")
    if _LF in value or _CR in value:
        return value.replace(b"\r", b"").replace(b"\n", b"").strip(b" \t")
    return value  # on one line, as most are


def _trace_values(block: bytes, lower: bytes, name: bytes, pattern: re.Pattern[bytes], most: int) -> Sequence[str]:
    """The values of the first `most` fields called `name`, which begins with an LF."""
    values: list[str] = []
    start = lower.find(name)
    while start >= 0 and len(values) < most:
        field = pattern.match(lower, start)
        if field is not None:
            value = _value(block, field)
            is_fit = len(value) <= MAX_TRACE_VALUE_OCTETS and value.isascii()
            values.append(value.decode("ascii") if is_fit else "")
            start = field.end()
        else:
            start += len(name)
        start = lower.find(name, start)
    return values
