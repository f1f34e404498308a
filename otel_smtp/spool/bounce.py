"""Delivery status notifications: what a sender is told of recipients that failed, wait, or were handed on without DSN.

A notice is a `multipart/report` (RFC 6522) of three parts: words for people, `message/delivery-status` for programs
(RFC 3464), and the header block of the original, or all of it (RFC 3461 4.3). It is put together octet by octet: the
standard library's email package would fold, reorder or re-encode what is returned.

Whatever a peer wrote (addresses, ENVID, ORCPT, the upstream's replies, the original) stands here as text only: control
octets are replaced before it is placed, so that nothing of it can begin a field, a part, or a message (P13). A boundary
that occurs in the original is exchanged for another one.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime
from enum import StrEnum
from typing import Final

from otel_smtp.smtp.envelope import Body, Mail, Notify, Recipient
from otel_smtp.smtp.replies import Reply

LINE_OCTETS: Final = 998  # RFC 5322 2.1.1, without CRLF
_WRAP_CHARACTERS: Final = 72
_FIELD_OCTETS: Final = 900
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_XTEXT = re.compile(r"\+([0-9A-F]{2})")


class Kind(StrEnum):
    """What a notice tells; the values are those of the Action field (RFC 3464 2.3.3)."""

    FAILED = "failed"
    DELAYED = "delayed"
    RELAYED = "relayed"  # to an upstream that will not tell of success


@dataclass(frozen=True, slots=True)
class Status:
    """What became of one recipient.

    Attributes:
        reply: the upstream's last one, or ours; None where there is none.
        remote: the upstream's host name, where it was its reply.
    """

    recipient: Recipient
    reply: Reply | None
    remote: str | None = None
    last_attempt: datetime | None = None
    will_retry_until: datetime | None = None


def wanted(kind: Kind, recipient: Recipient, mail: Mail) -> bool:
    """Whether the sender wants a notice of this kind (RFC 3461 4.1 and 5.2).

    Without NOTIFY: of failures and delays. Never for the null reverse-path: "MUST NOT" (RFC 5321 6.1).
    """
    if not mail.reverse_path:
        return False
    if recipient.notify is None:
        return kind is not Kind.RELAYED
    asked = {Kind.FAILED: Notify.FAILURE, Kind.DELAYED: Notify.DELAY, Kind.RELAYED: Notify.SUCCESS}
    return asked[kind] in recipient.notify


def envelope(mail: Mail, *, is_ascii: bool) -> tuple[Mail, Recipient]:
    """The envelope of a notice for `mail`: from nobody, to its sender, and never answered (RFC 3461 6.1).

    Args:
        is_ascii: the notice holds nothing else, so that any upstream can take it.
    """
    return (
        Mail("", body=None if is_ascii else Body.EIGHT_BIT_MIME, smtputf8=not mail.reverse_path.isascii()),
        Recipient(mail.reverse_path, Notify.NEVER),
    )


def notification(
    kind: Kind,
    *,
    mail: Mail,
    statuses: Sequence[Status],
    header: bytes,
    content: bytes | None,
    reporting_mta: str,
    spool_id: str,
    arrived: datetime,
    now: datetime,
    message_id: str,
    trace_id: str | None = None,
) -> bytes:
    """The whole content of a notice: CRLF line ends, no NUL, no line over 998 octets.

    Args:
        statuses: of the recipients that it tells of, one or more.
        header: the original's header block, complete or cut.
        content: the whole original, where that is returned.
        spool_id, message_id: the original's id here; the notice's own Message-ID, angle brackets included.
    """
    returned = _returned(header if content is None else content)
    boundary = _boundary(spool_id, returned)
    is_utf8 = mail.smtputf8
    report = "\r\n".join(_report(kind, mail, statuses, reporting_mta, spool_id, arrived)).encode()
    words = "\r\n".join(_words(kind, mail, statuses, reporting_mta, spool_id, arrived, trace_id)).encode()
    # RFC 6533 3 and 4: with addresses beyond ASCII the parts have types of their own.
    status_type = "message/global-delivery-status" if is_utf8 else "message/delivery-status"
    if content is None:
        returned_type = "message/global-headers" if is_utf8 else "text/rfc822-headers"
    else:
        returned_type = "message/global" if is_utf8 else "message/rfc822"
    head = [
        f"From: Mail Delivery System <MAILER-DAEMON@{_clean(reporting_mta)}>",
        f"To: {_clean(mail.reverse_path)}",
        f"Subject: {_SUBJECTS[kind]}",
        f"Date: {format_datetime(now)}",
        f"Message-ID: {message_id}",
        # RFC 3834 5: so that no other program answers it.
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        "Content-Type: multipart/report; report-type=delivery-status;",
        f' boundary="{boundary}"',
    ]
    parts = (
        ("text/plain; charset=utf-8", words),
        (status_type, report),
        (returned_type, returned),
    )
    pieces = ["\r\n".join(head).encode(), b"\r\n\r\nThis is a report in MIME format.\r\n"]
    for content_type, octets in parts:
        encoding = "7bit" if octets.isascii() else "8bit"
        fields = f"Content-Type: {content_type}\r\nContent-Transfer-Encoding: {encoding}"
        pieces.append(f"\r\n--{boundary}\r\n{fields}\r\n\r\n".encode())
        pieces.append(octets)
    pieces.append(f"\r\n--{boundary}--\r\n".encode())
    return b"".join(pieces)


_SUBJECTS: Final = {
    Kind.FAILED: "Undelivered mail returned to sender",
    Kind.DELAYED: "Delayed mail (still being tried)",
    Kind.RELAYED: "Mail was handed on",
}
_FIRST_WORDS: Final = {
    Kind.FAILED: "Your message could not be delivered to the recipients below. It will not be tried again.",
    Kind.DELAYED: "Your message has not been delivered yet to the recipients below. You need not do anything: it is "
    "tried again until the time that is given, and you will be told if that was in vain.",
    Kind.RELAYED: "Your message was accepted for the recipients below by a server that does not report on delivery.",
}


def _words(
    kind: Kind,
    mail: Mail,
    statuses: Sequence[Status],
    reporting_mta: str,
    spool_id: str,
    arrived: datetime,
    trace_id: str | None,
) -> Iterable[str]:
    yield f"This is the mail gateway at {_clean(reporting_mta)}."
    yield ""
    yield from _wrapped(_FIRST_WORDS[kind])
    for status in statuses:
        yield ""
        yield f"  {_clean(status.recipient.address)}"
        if status.reply is not None:
            said = f"{_clean(status.remote)} said" if status.remote else "reason"
            yield from (f"    {line}" for line in _wrapped(f"{said}: {_clean(str(status.reply))}"))
        if status.will_retry_until is not None:
            yield f"    is tried until {format_datetime(status.will_retry_until)}"
    yield ""
    yield f"The message came here on {format_datetime(arrived)} and has the id {spool_id}."
    if trace_id is not None:
        yield f"Its trace: {trace_id}"


def _report(
    kind: Kind, mail: Mail, statuses: Sequence[Status], reporting_mta: str, spool_id: str, arrived: datetime
) -> Iterable[str]:
    yield f"Reporting-MTA: dns; {_clean(reporting_mta)}"
    if mail.envid:
        yield f"Original-Envelope-Id: {_clean(_decoded(mail.envid))}"
    yield f"Arrival-Date: {format_datetime(arrived)}"
    yield f"X-Spool-Id: {spool_id}"
    for status in statuses:
        yield ""
        yield from _fields(kind, mail, status)
    yield ""


def _fields(kind: Kind, mail: Mail, status: Status) -> Iterable[str]:
    address, reply = status.recipient.address, status.reply
    if status.recipient.orcpt:
        address_type, _, original = status.recipient.orcpt.partition(";")
        yield f"Original-Recipient: {_clean(address_type)}; {_clean(_decoded(original))}"
    yield f"Final-Recipient: {'rfc822' if address.isascii() else 'utf-8'}; {_clean(address)}"
    yield f"Action: {kind.value}"
    yield f"Status: {_status_code(kind, reply)}"
    if status.remote:
        yield f"Remote-MTA: dns; {_clean(status.remote)}"
    if reply is not None and kind is not Kind.RELAYED:
        yield f"Diagnostic-Code: smtp; {_clean(str(reply))}"
    if status.last_attempt is not None:
        yield f"Last-Attempt-Date: {format_datetime(status.last_attempt)}"
    if status.will_retry_until is not None:
        yield f"Will-Retry-Until: {format_datetime(status.will_retry_until)}"


def _status_code(kind: Kind, reply: Reply | None) -> str:
    """The enhanced code; the reply's, or, where it gave none, the one that says as much (RFC 3463 3)."""
    klass = {Kind.FAILED: 5, Kind.DELAYED: 4, Kind.RELAYED: 2}[kind]
    if reply is None or (kind is Kind.RELAYED and reply.enhanced is None):
        return f"{klass}.0.0"
    if reply.enhanced is not None:
        return str(reply.enhanced)
    return f"{reply.code // 100}.0.0"


def _returned(original: bytes) -> bytes:
    """The original as it may stand in a part: lines within bounds, no NUL, CRLF only."""
    clean = original.replace(b"\0", b"?").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = [line[start : start + LINE_OCTETS] for line in clean.split(b"\n") for start in _starts(line)]
    return b"\r\n".join(lines)


def _starts(line: bytes) -> Sequence[int]:
    return range(0, len(line), LINE_OCTETS) if line else (0,)


def _boundary(spool_id: str, returned: bytes) -> str:
    number = 0
    while f"--=_{spool_id}.{number}".encode() in returned:
        number += 1
    return f"=_{spool_id}.{number}"


def _decoded(xtext: str) -> str:
    """Decode xtext (RFC 3461 4)."""
    return _XTEXT.sub(lambda match: chr(int(match[1], 16)), xtext)


def _clean(text: str) -> str:
    """`text` without control octets, as much of it as a line can hold beside a field's name."""
    return _CONTROL.sub("?", text).encode()[:_FIELD_OCTETS].decode(errors="ignore")


def _wrapped(text: str) -> Iterable[str]:
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > _WRAP_CHARACTERS:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield line
