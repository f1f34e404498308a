"""Delivery status notifications: reports to a sender on recipients that failed, wait, or were relayed without DSN.

A notice is a `multipart/report` (RFC 6522) of three parts: words for people, `message/delivery-status` for programs
(RFC 3464), and the header block of the original, or all of it (RFC 3461 4.3). It is assembled octet by octet: the
standard library's email package would fold, reorder or re-encode the original.

Two rules hold for every part:

* Text of peers (addresses, ENVID, ORCPT, the upstream's replies, its name) appears in one place each, cleaned by
  `_clean`, so that it cannot begin a line, a field, a part, or a message. A boundary that occurs in a part is replaced
  by another one.
* The original is returned unchanged, or not at all. A header block that is not plain text is encoded, which is allowed
  for `text/rfc822-headers` but not for `message/rfc822` (RFC 2046 5.2.1); so of an original with octets that no mail
  can carry only the header block is returned.

A notice is ASCII if possible, so that every upstream can take it. Other octets occur only in a returned original, and
in RFC 6533's parts for internationalised mail; `envelope` then requests 8BITMIME.
"""

import re
from binascii import b2a_qp
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime
from enum import StrEnum
from typing import Final

from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.smtp.framing import has_bare_line_end
from otel_smtp.smtp.parameters import decode_xtext
from otel_smtp.smtp.paths import address_literal, is_visible
from otel_smtp.smtp.received import inspect_header
from otel_smtp.smtp.replies import Reply

LINE_OCTETS: Final = 998  # RFC 5322 2.1.1, without CRLF
HEADER_OCTETS: Final = 50_000
"""The largest returned header block: otherwise a client could have large ones sent back as often as it likes."""

_WRAP_CHARACTERS: Final = 72
_VALUE_OCTETS: Final = 900  # the rest of a line is for the text before a value
_MESSAGE_ID = re.compile(r"<[!-;=?-~]{1,900}>")
_ADDRESS_TYPE = re.compile(r"[!-:<-~]{1,64}")
# Characters that an address must not have in its 7-bit form: xtext-specials and all beyond ASCII (RFC 6533 3).
_NOT_QCHAR = re.compile(r"[^!-*,-<>-\[\]-~]")


class NoticeKind(StrEnum):
    """The kinds of notices; the values are those of the Action field (RFC 3464 2.3.3).

    Expired recipients have failed, with status 4.4.7 (RFC 3463 3.5). "delivered" and "expanded" are for owners of
    mailboxes and lists.
    """

    FAILED = "failed"
    DELAYED = "delayed"
    RELAYED = "relayed"  # to an upstream that does not report success


# The classes of status that fit an action, the usual one first: an expired recipient has "4.X.X".
_CLASSES: Final = {NoticeKind.FAILED: (5, 4), NoticeKind.DELAYED: (4,), NoticeKind.RELAYED: (2,)}


@dataclass(frozen=True, slots=True)
class Status:
    """The status of one recipient.

    Attributes:
        reply: the upstream's last one, or ours; None without one.
        remote: the upstream's host name, if the reply is the upstream's.
        before: if `reply` only reports expiry, the reply to the last attempt, as text; otherwise "".
    """

    recipient: Recipient
    reply: Reply | None
    remote: str | None = None
    last_attempt: datetime | None = None
    will_retry_until: datetime | None = None
    before: str = ""


def wanted(kind: NoticeKind, recipient: Recipient, mail: Mail) -> bool:
    """Whether the sender wants a notice of this kind (RFC 3461 4.1 and 5.2).

    Without NOTIFY: for failures and delays. Never for the null reverse-path: "MUST NOT" (RFC 5321 6.1). The caller must
    make sure that success is reported only if the upstream does not do so itself (RFC 3461 5.2.1).
    """
    if not mail.reverse_path:
        return False
    if recipient.notify is None:
        return kind is not NoticeKind.RELAYED
    asked = {NoticeKind.FAILED: Notify.FAILURE, NoticeKind.DELAYED: Notify.DELAY, NoticeKind.RELAYED: Notify.SUCCESS}
    return asked[kind] in recipient.notify


def returns_content(kind: NoticeKind, mail: Mail) -> bool:
    """Whether a notice returns the whole original, unless that is too large.

    RET=FULL speaks of failures alone (RFC 3461 4.3). "If both RET=FULL and REQUIRETLS are present, the RET=FULL MUST
    be disregarded" (RFC 8689 5).
    """
    return kind is NoticeKind.FAILED and mail.ret is DsnReturn.FULL and not mail.require_tls


def envelope(mail: Mail, *, is_ascii: bool) -> tuple[Mail, Recipient]:
    """The envelope of a notice for `mail`: from the null path, to its sender, and never answered (RFC 3461 6.1).

    It requires TLS if `mail` did, whose header it repeats (RFC 8689 5).

    Args:
        is_ascii: the notice is all ASCII, so any upstream can take it.
    """
    return (
        Mail(
            "",
            body=None if is_ascii else Body.EIGHT_BIT_MIME,
            smtputf8=not mail.reverse_path.isascii(),
            require_tls=mail.require_tls,
        ),
        Recipient(mail.reverse_path, Notify.NEVER),
    )


def notification(
    kind: NoticeKind,
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
    eight_bit: bool = True,
) -> bytes:
    """The whole content of a notice: CRLF line ends, no NUL, no line over 998 octets.

    Args:
        statuses: of the recipients that it reports on, one or more.
        header: the original's header block, complete or cut anywhere, without the empty line behind it.
        content: the whole original, including its header block, if it is to be returned and not too large.
        reporting_mta: our host name.
        spool_id, message_id: the original's id here, an atom; the notice's own Message-ID, angle brackets included.
        eight_bit: False: the upstream takes 7-bit content only (except for a non-ASCII reverse-path, which implies
            more).

    Returns:
        The notice; `envelope` must know whether it holds anything beyond ASCII.
    """
    is_international = mail.smtputf8 and eight_bit
    report = _Report(kind, mail, statuses, reporting_mta, spool_id, arrived, trace_id)
    parts = (
        _words_part(report.words()),
        _status_part(report, is_international=is_international),
        _returned_part(header, content, is_international=is_international, eight_bit=eight_bit),
    )
    boundary = _boundary(spool_id, parts)
    fields = [
        f"From: Mail Delivery System <MAILER-DAEMON@{_clean(reporting_mta)}>",
        f"To: {_clean(mail.reverse_path)}",
        f"Subject: {_SUBJECTS[kind]}",
        f"Date: {format_datetime(now)}",
        f"Message-ID: {message_id}",
        *_threading(header),
        # RFC 3834 5: tells other programs not to answer it.
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        "Content-Type: multipart/report; report-type=delivery-status;",
        f' boundary="{boundary}"',
    ]
    if any(part.encoding == "8bit" for part in parts):
        fields.append("Content-Transfer-Encoding: 8bit")  # the widest encoding of its parts (RFC 2045 6.4)
    pieces = ["\r\n".join(fields).encode(), b"\r\n\r\nThis is a report in MIME format.\r\n"]
    for part in parts:
        pieces += (f"\r\n--{boundary}\r\n".encode(), part.head(), part.octets)
    pieces.append(f"\r\n--{boundary}--\r\n".encode())
    return b"".join(pieces)


_SUBJECTS: Final = {
    NoticeKind.FAILED: "Undelivered mail returned to sender",
    NoticeKind.DELAYED: "Delayed mail (still being tried)",
    NoticeKind.RELAYED: "Mail was handed on",
}
_FIRST_WORDS: Final = {
    NoticeKind.FAILED: "Your message could not be delivered to the recipients below, and will not be tried again. "
    "Where the reason is an address or the message itself, correct it and send the message again; else ask your "
    "postmaster, who finds it by its id.",
    NoticeKind.DELAYED: "Your message has not been delivered yet to the recipients below. You need not do anything: it "
    "is tried again until the time that is given, and you will be told if that was in vain.",
    NoticeKind.RELAYED: "Your message was accepted for the recipients below by a server that does not report on "
    "delivery. You need not do anything; should it fail beyond that server, you may be told.",
}


# The facts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Report:
    """The facts of a report, written for people and for programs."""

    kind: NoticeKind
    mail: Mail
    statuses: Sequence[Status]
    reporting_mta: str
    spool_id: str
    arrived: datetime
    trace_id: str | None

    def words(self) -> Iterable[str]:
        """The lines for people."""
        yield f"This is the mail gateway at {_clean(self.reporting_mta)}."
        yield ""
        yield from _wrapped(_FIRST_WORDS[self.kind])
        for status in self.statuses:
            yield ""
            yield f"  {_clean(status.recipient.address)}"
            yield from (f"    {line}" for line in _told(status))
        yield ""
        yield f"The message came here on {format_datetime(self.arrived)} and has the id"
        yield f"{self.spool_id}."
        if self.trace_id is not None:
            yield f"Its trace: {_clean(self.trace_id)}"

    def fields(self, *, is_international: bool) -> Iterable[str]:
        """The fields for programs: of the message, then of each recipient, each group after an empty line."""
        yield f"Reporting-MTA: {_host(self.reporting_mta)}"
        if self.mail.envid:
            yield f"Original-Envelope-Id: {_clean(_decoded(self.mail.envid))}"
        yield f"Arrival-Date: {format_datetime(self.arrived)}"
        # "Extension fields ... beginning with "X-"" (RFC 3464 2.4)
        yield f"X-Spool-Id: {self.spool_id}"
        if self.trace_id is not None:
            yield f"X-Trace-Id: {_clean(self.trace_id)}"
        for status in self.statuses:
            yield ""
            yield from self._fields_of(status, is_international=is_international)

    def _fields_of(self, status: Status, *, is_international: bool) -> Iterable[str]:
        if original := _original_recipient(status.recipient, is_international=is_international):
            yield f"Original-Recipient: {original}"
        yield f"Final-Recipient: {_address(status.recipient.address, is_international=is_international)}"
        yield f"Action: {self.kind.value}"
        yield f"Status: {_status_code(self.kind, status.reply)}"
        if status.remote:
            yield f"Remote-MTA: {_host(status.remote)}"
        diagnostic = status.before or (str(status.reply) if status.reply is not None else "")
        if diagnostic and self.kind is not NoticeKind.RELAYED:
            # Folded, since replies are long and people read this too.
            yield "\r\n ".join(_wrapped(f"Diagnostic-Code: smtp; {_clean(diagnostic)}"))
        if status.last_attempt is not None:
            yield f"Last-Attempt-Date: {format_datetime(status.last_attempt)}"
        if status.will_retry_until is not None:
            yield f"Will-Retry-Until: {format_datetime(status.will_retry_until)}"


def _told(status: Status) -> Iterable[str]:
    if status.reply is not None:
        said = f"{_clean(status.remote)} said" if status.remote else "reason"
        yield from _wrapped(f"{said}: {_clean(str(status.reply))}")
    if status.before:
        yield from _wrapped(f"at the last attempt: {_clean(status.before)}")
    if status.will_retry_until is not None:
        yield f"is tried until {format_datetime(status.will_retry_until)}"


def _status_code(kind: NoticeKind, reply: Reply | None) -> str:
    """The reply's enhanced code; without a fitting one, the general code of its class (RFC 3463 3)."""
    classes = _CLASSES[kind]
    if reply is None or reply.code // 100 not in classes:
        return f"{classes[0]}.0.0"
    if reply.enhanced is not None and reply.enhanced.klass == reply.code // 100:
        return str(reply.enhanced)
    return f"{reply.code // 100}.0.0"


def _host(name: str) -> str:
    """A host with its type, "dns" (RFC 3464 2.1.2); "[192.0.2.1]" if only its address is known."""
    try:
        return f"dns; {address_literal(name)}"
    except ValueError:
        return f"dns; {_clean(name)}"


def _original_recipient(recipient: Recipient, *, is_international: bool) -> str:
    """ORCPT in the form of its field; "" without one."""
    address_type, _, xtext = (recipient.orcpt or "").partition(";")
    if not xtext or _ADDRESS_TYPE.fullmatch(address_type) is None:
        return ""
    original = _clean(_decoded(xtext))
    if not original.isascii() and not is_international:
        original = _seven_bit(original)
    return f"{address_type}; {original}"


def _address(address: str, *, is_international: bool) -> str:
    """A recipient with its type (RFC 3464 2.3.2, RFC 6533 3)."""
    clean = _clean(address)
    if clean.isascii():
        return f"rfc822; {clean}"
    return f"utf-8; {clean if is_international else _seven_bit(clean)}"


def _seven_bit(address: str) -> str:
    """utf-8-addr-xtext, cut to what a line can hold: the form for an ASCII part (RFC 6533 3)."""
    if "\\x{" in address:  # only in an ORCPT that arrived at least partly in this form
        return "".join(char if char.isascii() else _embedded(char) for char in address)[:_VALUE_OCTETS]
    return _NOT_QCHAR.sub(lambda match: _embedded(match[0]), address)[:_VALUE_OCTETS]


def _embedded(char: str) -> str:
    return f"\\x{{{ord(char):02X}}}"


def _threading(header: bytes) -> Iterable[str]:
    """Fields that let a mail program show the notice with its mail (RFC 3834 3.1.5)."""
    message_id = inspect_header(header).message_id or ""
    if _MESSAGE_ID.fullmatch(message_id) is not None:
        yield f"In-Reply-To: {message_id}"
        yield f"References: {message_id}"


# The parts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the report, ready to send.

    Attributes:
        encoding: 7bit, 8bit or quoted-printable.
    """

    content_type: str
    description: str
    encoding: str
    octets: bytes

    def head(self) -> bytes:
        """Its own header block."""
        return (
            f"Content-Type: {self.content_type}\r\n"
            f"Content-Description: {self.description}\r\n"
            f"Content-Transfer-Encoding: {self.encoding}\r\n\r\n"
        ).encode()


def _words_part(lines: Iterable[str]) -> _Part:
    octets = "\r\n".join(lines).encode()
    if octets.isascii():
        return _Part("text/plain; charset=us-ascii", "Notification", "7bit", octets)
    return _Part("text/plain; charset=utf-8", "Notification", "quoted-printable", _quoted_printable(octets))


def _status_part(report: _Report, *, is_international: bool) -> _Part:
    lines = "".join(f"{line}\r\n" for line in report.fields(is_international=is_international))
    if lines.isascii() or not is_international:
        # Addresses have a form for this; nothing else here can be non-ASCII.
        return _Part("message/delivery-status", "Delivery report", "7bit", lines.encode("ascii", "replace"))
    return _Part("message/global-delivery-status", "Delivery report", "8bit", lines.encode())


def _returned_part(header: bytes, content: bytes | None, *, is_international: bool, eight_bit: bool) -> _Part:
    if content is not None and _is_sendable(content) and (eight_bit or content.isascii()):
        encoding = "7bit" if content.isascii() else "8bit"
        # "message/global" is for header fields beyond ASCII (RFC 6532 3.7).
        is_global = is_international and not header.isascii()
        return _Part("message/global" if is_global else "message/rfc822", "Undelivered message", encoding, content)
    header = _cut(header)
    if header.isascii() and _is_sendable(header):
        return _Part("text/rfc822-headers", "Header of the message", "7bit", header)
    if is_international and _is_utf8(header) and _is_sendable(header):
        return _Part("message/global-headers", "Header of the message", "8bit", header)
    # "If the headers ... require encoding to make them legal 7-bit content, they may be encoded using quoted-printable"
    # (RFC 6522 4)
    return _Part("text/rfc822-headers", "Header of the message", "quoted-printable", _quoted_printable(header))


def _cut(header: bytes) -> bytes:
    """The whole lines of a header block to return; a line cut by the caller is left out."""
    end = header.rfind(b"\r\n", 0, HEADER_OCTETS)
    return header[: end + 2] if end >= 0 else header[:HEADER_OCTETS]


def _is_sendable(octets: bytes) -> bool:
    """Whether mail can carry `octets` unchanged: CRLF line ends only, lines within bounds, no NUL (RFC 5322 2.3)."""
    if b"\0" in octets or has_bare_line_end(octets):
        return False
    return max(map(len, octets.split(b"\r\n"))) <= LINE_OCTETS


def _is_utf8(octets: bytes) -> bool:
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True


def _quoted_printable(octets: bytes) -> bytes:
    """RFC 2045 6.7; a bare CR or LF is no line end, and encoded like any other octet."""
    return b"\r\n".join(b2a_qp(line, istext=False).replace(b"=\n", b"=\r\n") for line in octets.split(b"\r\n"))


def _boundary(spool_id: str, parts: Iterable[_Part]) -> str:
    whole = b"\r\n".join(part.octets for part in parts)
    number = 0
    while f"--=_{spool_id}.{number}".encode() in whole:
        number += 1
    return f"=_{spool_id}.{number}"


# Text of peers -----------------------------------------------------------------------------------------------


def _decoded(xtext: str) -> str:
    """Decode xtext (RFC 3461 4); other text is returned unchanged."""
    try:
        return decode_xtext(xtext)
    except ValueError:
        return xtext


def _clean(text: str) -> str:
    """`text` in one line, without control and invisible characters, cut to what a line can hold."""
    if not is_visible(text):
        text = "".join(char if is_visible(char) else "?" for char in text)
    return text if len(text) * 4 <= _VALUE_OCTETS else text.encode()[:_VALUE_OCTETS].decode(errors="ignore")


def _wrapped(text: str) -> Iterable[str]:
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > _WRAP_CHARACTERS:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield line
