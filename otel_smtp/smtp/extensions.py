"""SMTP extensions: the EHLO keywords that are offered, and the MAIL and RCPT parameters that belong to them.

Theory of operation
-------------------
Parsing knows every parameter of every extension that the gateway can ever offer, whatever this connection offers; a
parameter is refused here only if it is unknown everywhere, given twice, or malformed. Whether its extension is offered
on *this* connection is asked by `unsupported` and `unsupported_recipient`.

Values that travel on to the upstream (ENVID, ORCPT, AUTH) are xtext. They are decoded to be judged and encoded anew to
be kept, so that only canonical xtext is ever repeated: a CR LF encoded in ENVID or ORCPT has reached the headers of
bounces in servers that kept what they got.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Self

from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.smtp.paths import is_visible
from otel_smtp.smtp.replies import Reply

CAN_BE_DISABLED: Final = (
    "PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "CHUNKING", "BINARYMIME", "DSN", "REQUIRETLS", "LIMITS",
)  # fmt: skip
"""Extensions of an upstream that the gateway can do without. STARTTLS and AUTH are asked for where they are needed."""

MAX_ENVID_CHARACTERS: Final = 100
"""RFC 3461 4.4, in xtext form."""

MAX_ORCPT_CHARACTERS: Final = 500
"""RFC 3461 4.2, address type and xtext together."""

MAX_LIMIT_VALUE: Final = 999_999
"""RFC 9422 3: "6-digit maximum"; a limit beyond it is as good as none and is not announced."""

# esmtp-keyword "=" esmtp-value (RFC 5321 4.1.2), the value opened to UTF-8 by RFC 6531 3.3
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([!-<>-~\x80-\U0010ffff]+))?")
_SIZE = re.compile(r"[0-9]{1,20}")  # RFC 1870 4
_XTEXT = re.compile(r"[!-*,-<>-~]*(?:\+[0-9A-Fa-f]{2}[!-*,-<>-~]*)*")  # RFC 3461 4
_HEXCHAR = re.compile(rb"\+([0-9A-Fa-f]{2})")
_NOT_XCHAR = re.compile(rb"[^!-*,-<>-~]")
_EMBEDDED = re.compile(r"\\x\{(10[0-9A-F]{4}|[1-9A-F][0-9A-F]{1,4}|0[0-9A-F])\}")  # EmbeddedUnicodeChar (RFC 6533 3)
_ADDRESS_TYPE = re.compile(r"[A-Za-z0-9!#$%&'*/?^_`{|}~-]+")  # an atom (RFC 3461 4.2) without what xtext would encode


class ParameterRefused(Exception):
    """A MAIL or RCPT parameter is unknown, doubled or malformed.

    Attributes:
        reply: what to answer.
    """

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Offer:
    """What EHLO offers on one connection at one time; STARTTLS and AUTH change it.

    PIPELINING and ENHANCEDSTATUSCODES are always offered, which is also all that LMTP demands (RFC 2033 5).

    Attributes:
        size: octets of the largest message; 0: SIZE is offered without a limit; None: SIZE is not offered.
        binary_mime: holds only together with `chunking` (RFC 3030 3).
        smtputf8: holds only together with `eight_bit_mime` (RFC 6531 3.1 item 8).
        starttls: STARTTLS can be given now, so TLS is not on.
        auth_mechanisms: in the order announced. It stays set after AUTH has succeeded, for AUTH= of MAIL.
        require_tls: holds only where TLS is on (RFC 8689 2); with `starttls` it is therefore not announced.
        limits: RCPTMAX, MAILMAX, RCPTDOMAINMAX by name (RFC 9422).
    """

    size: int | None = None
    eight_bit_mime: bool = True
    smtputf8: bool = True
    binary_mime: bool = False
    chunking: bool = True
    dsn: bool = True
    starttls: bool = False
    auth_mechanisms: tuple[str, ...] = ()
    require_tls: bool = False
    limits: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def takes_binary_mime(self) -> bool:
        """Whether BINARYMIME is announced and BODY=BINARYMIME taken."""
        return self.binary_mime and self.chunking

    @property
    def takes_smtputf8(self) -> bool:
        """Whether SMTPUTF8 is announced and taken."""
        return self.smtputf8 and self.eight_bit_mime

    @property
    def takes_require_tls(self) -> bool:
        """Whether REQUIRETLS is announced and taken."""
        return self.require_tls and not self.starttls


@dataclass(frozen=True, slots=True)
class Extensions:
    """What an upstream said it can do, in its last EHLO; the defaults are those of a server that knows only HELO.

    Attributes:
        offers_size: SIZE= may be given with MAIL.
        size: octets of the largest message; None: no limit was told.
        auth: SASL mechanisms in the order offered, in capitals.
        limits: RCPTMAX, MAILMAX, RCPTDOMAINMAX by name (RFC 9422), where they are numbers.
    """

    pipelining: bool = False
    eight_bit_mime: bool = False
    smtputf8: bool = False
    binary_mime: bool = False
    chunking: bool = False
    dsn: bool = False
    enhanced_status_codes: bool = False
    starttls: bool = False
    require_tls: bool = False
    offers_size: bool = False
    size: int | None = None
    auth: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def parse(cls, lines: Sequence[str], *, disabled: Collection[str] = ()) -> Self:
        """Read the keyword lines of an EHLO reply: all but its first line. What is not understood is left out.

        Args:
            disabled: keywords, in capitals, that count as not offered.
        """
        words: dict[str, list[str]] = {}
        for line in lines:
            # AUTH=LOGIN is how it was announced before RFC 2554; some servers still say both.
            keyword, *values = (
                line.replace("=", " ", 1).split() if line[:5].upper() == "AUTH=" else line.split() or [""]
            )
            words.setdefault(keyword.upper(), []).extend(values)
        for keyword in disabled:
            words.pop(keyword, None)
        size = next((int(word) for word in words.get("SIZE", ()) if word.isdecimal() and len(word) <= 20), 0)
        return cls(
            pipelining="PIPELINING" in words,
            eight_bit_mime="8BITMIME" in words,
            smtputf8="SMTPUTF8" in words,
            binary_mime="BINARYMIME" in words and "CHUNKING" in words,  # RFC 3030 3 wants both
            chunking="CHUNKING" in words,
            dsn="DSN" in words,
            enhanced_status_codes="ENHANCEDSTATUSCODES" in words,
            starttls="STARTTLS" in words,
            require_tls="REQUIRETLS" in words,
            offers_size="SIZE" in words,
            size=size or None,  # RFC 1870 4: "0 indicates that no fixed maximum message size is in force"
            auth=tuple(dict.fromkeys(word.upper() for word in words.get("AUTH", ()))),
            limits=MappingProxyType(_limits(words.get("LIMITS", ()))),
        )


def _limits(words: Sequence[str]) -> dict[str, int]:
    pairs = (word.partition("=") for word in words)
    return {name.upper(): int(value) for name, _, value in pairs if value.isdecimal() and 0 < len(value) <= 6}


def keywords(offer: Offer) -> tuple[str, ...]:
    """The keyword lines of the reply to EHLO and LHLO, in the order sent (RFC 5321 4.1.1.1)."""
    limits = " ".join(f"{name}={value}" for name, value in offer.limits.items() if 0 < value <= MAX_LIMIT_VALUE)
    lines = (
        ("PIPELINING", True),
        (f"SIZE {offer.size or 0}", offer.size is not None),
        ("8BITMIME", offer.eight_bit_mime),
        ("SMTPUTF8", offer.takes_smtputf8),
        ("ENHANCEDSTATUSCODES", True),
        ("CHUNKING", offer.chunking),
        ("BINARYMIME", offer.takes_binary_mime),
        ("DSN", offer.dsn),
        ("STARTTLS", offer.starttls),
        (f"AUTH {' '.join(offer.auth_mechanisms)}", bool(offer.auth_mechanisms)),
        ("REQUIRETLS", offer.takes_require_tls),
        (f"LIMITS {limits}", bool(limits)),
    )
    return tuple(line for line, is_offered in lines if is_offered)


def unsupported(mail: Mail, offer: Offer) -> Reply | None:
    """The refusal of a MAIL that uses an extension which `offer` does not hold; None if all is offered.

    RFC 5321 4.1.1.11: 555 for a parameter that is not recognised here, as after HELO. Whether the size is acceptable
    is not asked here.
    """
    if not mail.reverse_path.isascii() and not (mail.smtputf8 and offer.takes_smtputf8):
        return replies.NEEDS_SMTPUTF8  # RFC 6531 3.5: 553 (or 550) 5.6.7
    if (
        (mail.size is not None and offer.size is None)
        or (mail.body is not None and not _takes_body(mail.body, offer))
        or (mail.smtputf8 and not offer.takes_smtputf8)
        or ((mail.ret is not None or mail.envid is not None) and not offer.dsn)
        or (mail.auth is not None and not offer.auth_mechanisms)
        or (mail.require_tls and not offer.takes_require_tls)
    ):
        return replies.UNKNOWN_PARAMETER
    return None


def unsupported_recipient(recipient: Recipient, mail: Mail, offer: Offer) -> Reply | None:
    """The refusal of a RCPT that uses what `offer`, or its own MAIL, does not hold; None if all is offered."""
    if not mail.smtputf8 and not (recipient.address.isascii() and (recipient.orcpt or "").isascii()):
        return replies.NEEDS_SMTPUTF8
    if (recipient.notify is not None or recipient.orcpt is not None) and not offer.dsn:
        return replies.UNKNOWN_PARAMETER
    return None


def mail_with(reverse_path: str, parameters: str) -> Mail:
    """The `Mail` of a reverse-path and of the text behind it.

    Args:
        reverse_path: the mailbox, "" for the null path.
        parameters: what follows the path on the line: no control octets, separated by spaces, "" where nothing does.

    Raises:
        ParameterRefused: 555 for an unknown parameter, 501 for one that is malformed or given twice.
    """
    return Mail(reverse_path, **_read(parameters, _MAIL_PARAMETERS))


def recipient_with(address: str, parameters: str) -> Recipient:
    """The `Recipient` of an address and of the text behind it; arguments and errors as for `mail_with`."""
    return Recipient(address, **_read(parameters, _RCPT_PARAMETERS))


def decode_xtext(text: str) -> str:
    """The text that xtext stands for (RFC 3461 4).

    Lower-case hexadecimal digits are read too; `encode_xtext` writes upper case only, as the RFC wants.

    Raises:
        ValueError: not xtext, or it hides control octets or what is not UTF-8.
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


def _takes_body(body: Body, offer: Offer) -> bool:
    # BODY=8BITMIME where 8BITMIME is not offered: libraries send it whatever they were told, mostly with content that
    # is 7-bit. Whether it is, is seen when it is there.
    return body is not Body.BINARY_MIME or offer.takes_binary_mime


def _flag(value: str | None) -> bool:
    if value is not None:
        raise ValueError("takes no value")
    return True


def _size(value: str | None) -> int:
    if _SIZE.fullmatch(value or "") is None:
        raise ValueError("not 1 to 20 digits")
    return int(value or "")


def _body(value: str | None) -> Body:
    return Body((value or "").upper())


def _ret(value: str | None) -> DsnReturn:
    return DsnReturn((value or "").upper())


def _auth(value: str | None) -> str:
    if value is None:
        raise ValueError("needs a value")
    return encode_xtext(decode_xtext(value))


def _envid(value: str | None) -> str:
    return _ascii_xtext(value or "", limit=MAX_ENVID_CHARACTERS)


def _notify(value: str | None) -> Notify:
    notify = Notify(0)
    for word in (value or "").upper().split(","):
        flag = Notify.__members__.get(word)
        if flag is None or flag in notify:
            raise ValueError("unknown or doubled word")
        notify |= flag
    if Notify.NEVER in notify and notify is not Notify.NEVER:
        raise ValueError("NEVER does not stand alone")
    return notify


def _orcpt(value: str | None) -> str:
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
    """An address of type utf-8 (RFC 6533 3), as ASCII xtext or as itself, with or without embedded characters.

    Raises:
        ValueError: neither form, or an invisible character is hidden in an embedded one.
    """
    if address.isascii():
        text = decode_xtext(address)
        kept = encode_xtext(text)
    elif "+" in address or not is_visible(address):  # "+" would be decoded by whoever takes it for xtext
        raise ValueError("not utf-8-addr-unitext")
    else:
        text = kept = address
    plain = _EMBEDDED.sub(lambda match: chr(int(match[1], 16)) if match[1] != "5C" else "", text)
    if not plain or "\\" in plain or not is_visible(plain):
        raise ValueError("bad embedded character")
    return kept


_MAIL_PARAMETERS: Final[Mapping[str, tuple[str, Callable[[str | None], object]]]] = {
    "SIZE": ("size", _size),
    "BODY": ("body", _body),
    "SMTPUTF8": ("smtputf8", _flag),
    "RET": ("ret", _ret),
    "ENVID": ("envid", _envid),
    "AUTH": ("auth", _auth),
    "REQUIRETLS": ("require_tls", _flag),
}
_RCPT_PARAMETERS: Final[Mapping[str, tuple[str, Callable[[str | None], object]]]] = {
    "NOTIFY": ("notify", _notify),
    "ORCPT": ("orcpt", _orcpt),
}


def _read(parameters: str, known: Mapping[str, tuple[str, Callable[[str | None], object]]]) -> dict[str, Any]:
    """Field name and value of each parameter in `parameters`."""
    values: dict[str, Any] = {}
    for parameter in parameters.split(" "):
        if not parameter:
            continue  # more than one space: deployed servers take it
        match = _PARAMETER.fullmatch(parameter)
        if match is None:
            raise ParameterRefused(replies.BAD_ARGUMENT)
        if match[1].upper() not in known:
            raise ParameterRefused(replies.UNKNOWN_PARAMETER)
        name, convert = known[match[1].upper()]
        if name in values:
            raise ParameterRefused(replies.BAD_ARGUMENT)
        try:
            values[name] = convert(match[2])
        except ValueError:
            raise ParameterRefused(replies.BAD_ARGUMENT) from None
    return values
