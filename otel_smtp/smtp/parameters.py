"""Values of MAIL and RCPT parameters: reading a client's, and writing them for an upstream.

Values that travel on to the upstream (ENVID, ORCPT, AUTH) are xtext. They are decoded for checking and encoded again
for keeping, so that only canonical xtext is ever repeated: in servers that kept the original, a CR LF encoded in ENVID
or ORCPT has reached the headers of bounces.

Every reader takes the text behind "=", or None without a "="; it raises ValueError if the value is malformed.
"""

import re
from typing import Final

from otel_smtp.smtp.envelope import Body, DsnReturn, Notify
from otel_smtp.smtp.paths import is_visible

MAX_ENVID_CHARACTERS: Final = 100
"""RFC 3461 4.4, in xtext form."""

MAX_ORCPT_CHARACTERS: Final = 500
"""RFC 3461 4.2, address type and xtext together."""

_SIZE = re.compile(r"[0-9]{1,20}")  # RFC 1870 4
_XTEXT = re.compile(r"[!-*,-<>-~]*(?:\+[0-9A-Fa-f]{2}[!-*,-<>-~]*)*")  # RFC 3461 4
_HEXCHAR = re.compile(rb"\+([0-9A-Fa-f]{2})")
_NOT_XCHAR = re.compile(rb"[^!-*,-<>-~]")
_EMBEDDED = re.compile(r"\\x\{(10[0-9A-F]{4}|[1-9A-F][0-9A-F]{1,4}|0[0-9A-F])\}")  # EmbeddedUnicodeChar (RFC 6533 3)
_ADDRESS_TYPE = re.compile(
    r"[A-Za-z0-9!#$%&'*/?^_`{|}~-]+"
)  # an atom (RFC 3461 4.2) without characters that xtext encodes


def decode_xtext(text: str) -> str:
    """Decode xtext (RFC 3461 4).

    Also accepts lower-case hexadecimal digits; `encode_xtext` writes upper case only, as the RFC demands.

    Raises:
        ValueError: not xtext, or the decoded text has control octets or is not UTF-8.
    """
    if _XTEXT.fullmatch(text) is None:
        raise ValueError("not xtext")
    decoded = _HEXCHAR.sub(lambda match: bytes((int(match[1], 16),)), text.encode("ascii")).decode("utf-8")
    if not is_visible(decoded):
        raise ValueError("control or invisible characters within xtext")
    return decoded


def encode_xtext(text: str) -> str:
    """`text` as xtext (RFC 3461 4)."""
    return _NOT_XCHAR.sub(lambda match: b"+%02X" % match[0][0], text.encode("utf-8")).decode("ascii")


def read_flag(value: str | None) -> bool:
    """True: the keyword alone."""
    if value is not None:
        raise ValueError("takes no value")
    return True


def read_size(value: str | None) -> int:
    """SIZE, in octets (RFC 1870 4)."""
    if _SIZE.fullmatch(value or "") is None:
        raise ValueError("not 1 to 20 digits")
    return int(value or "")


def read_body(value: str | None) -> Body:
    """BODY (RFC 6152 2, RFC 3030 3)."""
    return Body((value or "").upper())


def read_ret(value: str | None) -> DsnReturn:
    """RET (RFC 3461 4.3)."""
    return DsnReturn((value or "").upper())


def read_auth(value: str | None) -> str:
    """AUTH, as canonical xtext (RFC 4954 5)."""
    if value is None:
        raise ValueError("needs a value")
    return encode_xtext(decode_xtext(value))


def read_envid(value: str | None) -> str:
    """ENVID, as canonical xtext (RFC 3461 4.4)."""
    return _ascii_xtext(value or "", limit=MAX_ENVID_CHARACTERS)


def read_notify(value: str | None) -> Notify:
    """NOTIFY (RFC 3461 4.1)."""
    notify = Notify(0)
    for word in (value or "").upper().split(","):
        flag = Notify.__members__.get(word)
        if flag is None or flag in notify:
            raise ValueError("unknown or doubled word")
        notify |= flag
    if Notify.NEVER in notify and notify is not Notify.NEVER:
        raise ValueError("NEVER does not stand alone")
    return notify


def read_orcpt(value: str | None) -> str:
    """ORCPT: the address type and the address, as canonical xtext or UTF-8 (RFC 3461 4.2, RFC 6533 3)."""
    address_type, _, address = (value or "").partition(";")
    if _ADDRESS_TYPE.fullmatch(address_type) is None or len(value or "") > MAX_ORCPT_CHARACTERS:
        raise ValueError("no address type, or too long")
    if address_type.lower() == "utf-8":
        return f"{address_type};{_utf8_address(address)}"
    return f"{address_type};{_ascii_xtext(address, limit=MAX_ORCPT_CHARACTERS)}"


def _ascii_xtext(value: str, *, limit: int) -> str:
    # RFC 3461 4.4: "printable (graphic and white space) characters from the US-ASCII repertoire"
    decoded = decode_xtext(value)
    xtext = encode_xtext(decoded)
    if not decoded.isascii() or not 0 < len(xtext) <= limit:
        raise ValueError("empty, too long or not ASCII")
    return xtext


def _utf8_address(address: str) -> str:
    """An address of type utf-8 (RFC 6533 3), as ASCII xtext or as UTF-8, with or without embedded characters.

    Raises:
        ValueError: neither form, or an embedded character is invisible.
    """
    if address.isascii():
        text = decode_xtext(address)
        kept = encode_xtext(text)
    elif "+" in address or not is_visible(address):  # a server that takes it for xtext would decode "+"
        raise ValueError("not utf-8-addr-unitext")
    else:
        text = kept = address
    plain = _EMBEDDED.sub(lambda match: chr(int(match[1], 16)) if match[1] != "5C" else "", text)
    if not plain or "\\" in plain or not is_visible(plain):
        raise ValueError("bad embedded character")
    return kept


def notify_text(notify: Notify) -> str:
    """The value of NOTIFY."""
    return ",".join(flag.name or "" for flag in Notify if flag in notify)
