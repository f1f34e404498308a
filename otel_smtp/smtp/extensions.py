"""SMTP extensions: the EHLO keywords that are offered, and the MAIL and RCPT parameters that belong to them.

Theory of operation
-------------------
`EXTENSIONS` has a row for each: its words in EHLO and how to read them, the parameters it adds, whether a client is
offered it only if the upstream offers it, and the fate of a mail that uses it if the upstream does not. A listener's
offer, the parameters for an upstream, and the extensions that settings can disable are all read from this table. A new
extension is a row, a field of `Extensions`, and the fields of `Mail` or `Recipient` that its parameters fill.

Parsing accepts every parameter of every extension that the gateway can offer on any connection; it refuses a parameter
only if it is unknown everywhere, given twice, or malformed. `unsupported` and `unsupported_recipient` check whether its
extension is offered on *this* connection.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Self

from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.parameters import (
    notify_text,
    read_auth,
    read_body,
    read_envid,
    read_flag,
    read_notify,
    read_orcpt,
    read_ret,
    read_size,
)
from otel_smtp.smtp.replies import Reply

MAX_LIMIT_VALUE: Final = 999_999
"""RFC 9422 3: "6-digit maximum"; a larger limit is as good as none and is not announced."""

# esmtp-keyword "=" esmtp-value (RFC 5321 4.1.2), the value opened to UTF-8 by RFC 6531 3.3: written as excluded
# characters, since a range up to the last code point takes 2 ms to compile.
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([^\x00-\x20=\x7f]+))?")


class ParameterRefused(Exception):
    """A MAIL or RCPT parameter is unknown, doubled or malformed.

    Attributes:
        reply: what to answer.
    """

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Extensions:
    """The extensions that one side offers: one field for each row of `EXTENSIONS`. The default is none at all.

    Used for an upstream's offer in its last EHLO, for a forwarder's promise on behalf of upstreams, and for a
    listener's offer to its clients.

    Attributes:
        size: octets of the largest message; 0: offered without a limit (RFC 1870 4); None: not offered.
        auth_mechanisms: SASL mechanisms in the order offered, in capitals. A listener keeps them after a successful
            AUTH, for AUTH= of MAIL.
        limits: RCPTMAX, MAILMAX, RCPTDOMAINMAX by name (RFC 9422), if they are numbers.
        keywords: the offered ones, each with the extension that it needs.
    """

    pipelining: bool = False
    size: int | None = None
    eight_bit_mime: bool = False
    smtputf8: bool = False
    enhanced_status_codes: bool = False
    chunking: bool = False
    binary_mime: bool = False
    dsn: bool = False
    starttls: bool = False
    auth_mechanisms: tuple[str, ...] = ()
    require_tls: bool = False
    limits: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    keywords: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Collect the offered keywords: MAIL and RCPT need them for each parameter."""
        object.__setattr__(self, "keywords", frozenset([line.partition(" ")[0] for line in keyword_lines(self)]))

    @classmethod
    def parse(cls, lines: Sequence[str], *, disabled: Collection[str] = ()) -> Self:
        """Read the keyword lines of an EHLO reply, that is all but its first line. Unknown keywords are left out.

        Args:
            disabled: keywords, in capitals, that count as not offered.
        """
        words: dict[str, list[str]] = {}
        for line in lines:
            # AUTH=LOGIN is the form from before RFC 2554; some servers still send both.
            keyword, *values = (
                line.replace("=", " ", 1).split() if line[:5].upper() == "AUTH=" else line.split() or [""]
            )
            words.setdefault(keyword.upper(), []).extend(values)
        for keyword in disabled:
            words.pop(keyword, None)
        fields: dict[str, Any] = {
            row.field: True if row.read is None else row.read(words[row.keyword])
            for row in EXTENSIONS
            if row.keyword in words and row.needs in (None, *words)
        }
        return cls(**fields)


class Parameter(NamedTuple):
    """A parameter of MAIL or RCPT.

    Attributes:
        field: of `Mail` or `Recipient`.
        read: makes the field's value from the text behind "=", or from None without a "="; raises ValueError.
        write: makes the text behind "=" from the value, for an upstream; a value of True is the keyword alone.
    """

    keyword: str
    field: str
    read: Callable[[str | None], object]
    write: Callable[[Any], str] = str


@dataclass(frozen=True, slots=True)
class Extension:
    """One extension: a row of the table that servers, clients and settings read.

    Attributes:
        keyword: of EHLO.
        field: of `Extensions`.
        mail: the parameters that it adds to MAIL.
        recipient: the parameters that it adds to RCPT.
        body: the value of BODY= that it adds.
        needs: the keyword of another extension, without which this one does not count.
        needs_tls: it counts under TLS only.
        is_relayed: a client is offered it only if the upstream offers it; the gateway serves the others by itself.
        can_be_disabled: the gateway can do without an upstream's. STARTTLS and AUTH are required where they are needed.
        is_taken_unoffered: clients that were not offered it may use its parameters.
        lacking: the refusal of a mail that uses it if the upstream does not offer it; None: its parameters are left
            out.
        read: makes the field's value from the words behind the keyword; without it the value is True.
        words: makes the words behind the keyword from the field's value, or None if it is not offered; without it there
            are none.
    """

    keyword: str
    field: str
    mail: tuple[Parameter, ...] = ()
    recipient: tuple[Parameter, ...] = ()
    body: Body | None = None
    needs: str | None = None
    needs_tls: bool = False
    is_relayed: bool = False
    can_be_disabled: bool = False
    is_taken_unoffered: bool = False
    lacking: Reply | None = None
    read: Callable[[Sequence[str]], Any] | None = None
    words: Callable[[Any], str | None] | None = None


def keyword_lines(extensions: Extensions) -> tuple[str, ...]:
    """The keyword lines of the reply to EHLO and LHLO, in the order sent (RFC 5321 4.1.1.1)."""
    lines: dict[str, str] = {}
    for row in EXTENSIONS:
        value = getattr(extensions, row.field)
        if row.words is not None:
            words = row.words(value)
            if words is not None:
                lines[row.keyword] = f"{row.keyword} {words}"
        elif value:
            lines[row.keyword] = row.keyword
    for row in EXTENSIONS:
        if row.needs is not None and row.needs not in lines:
            lines.pop(row.keyword, None)
    return tuple(lines.values())


def every_relayed() -> Extensions:
    """All that a client can be offered on behalf of an upstream, except a size without a limit."""
    fields: dict[str, Any] = {row.field: True for row in EXTENSIONS if row.is_relayed and row.field != "size"}
    return Extensions(chunking=True, **fields)


def offer_to_clients(behind: Extensions, *, is_tls: bool, **ours: Any) -> Extensions:
    """The offer of a listener.

    PIPELINING and ENHANCEDSTATUSCODES are always offered, which is also all that LMTP demands (RFC 2033 5).

    Args:
        behind: what can be promised on behalf of the upstream or the spool.
        ours: fields that the listener sets itself.
    """
    relayed = {
        row.field: getattr(behind, row.field) for row in EXTENSIONS if row.is_relayed and (is_tls or not row.needs_tls)
    }
    return Extensions(**{"pipelining": True, "enhanced_status_codes": True, "chunking": True, **relayed, **ours})


def unsupported(mail: Mail, offer: Extensions) -> Reply | None:
    """The refusal of a MAIL that uses an extension missing from `offer`; None if nothing is missing.

    RFC 5321 4.1.1.11: 555 for a parameter that is not recognised here, as after HELO. Does not check the size.
    """
    if not mail.reverse_path.isascii() and not (mail.smtputf8 and "SMTPUTF8" in offer.keywords):
        return replies.NEEDS_SMTPUTF8  # RFC 6531 3.5: 553 (or 550) 5.6.7
    if mail[2:] == BEYOND_SIZE and (mail.size is None or "SIZE" in offer.keywords):
        return None  # as nearly all mails are
    for row, place, value in _REFUSABLE_USES:
        given = mail[place]
        if given is None or given is False or (value is not None and given is not value):
            continue
        if row.keyword not in offer.keywords:
            return replies.UNKNOWN_PARAMETER
    return None


def unsupported_recipient(recipient: Recipient, mail: Mail, offer: Extensions) -> Reply | None:
    """The refusal of a RCPT that uses something missing from `offer` or from its MAIL; None if nothing is missing."""
    if not is_ascii(recipient) and not (mail.smtputf8 and "SMTPUTF8" in offer.keywords):
        return replies.NEEDS_SMTPUTF8
    for row, _, place in OF_RECIPIENT:
        if recipient[place] is not None and row.keyword not in offer.keywords:
            return replies.UNKNOWN_PARAMETER
    return None


def is_ascii(recipient: Recipient) -> bool:
    """Whether its address needs no SMTPUTF8."""
    return recipient.address.isascii() and (recipient.orcpt is None or recipient.orcpt.isascii())


def of_ascii_content(mail: Mail, recipients: Iterable[Recipient]) -> Mail:
    """The `Mail` of ASCII content without its SMTPUTF8, unless the envelope needs it.

    RFC 6531 3.4: such a client "SHOULD NOT supply the SMTPUTF8 parameter", as a later hop may lack it.
    """
    if mail.smtputf8 and mail.reverse_path.isascii() and all(map(is_ascii, recipients)):
        return mail._replace(smtputf8=False)
    return mail


def missing_extension(mail: Mail, upstream: Extensions, *, is_tls: bool) -> Reply | None:
    """The refusal of a mail that needs an extension missing upstream; None if nothing is missing.

    Clients may use only what they were offered (see `unsupported`), so an extension missing here was offered in good
    faith, and the upstream has changed, or another one replaces it: the refusal is temporary. Of the extensions that
    clients may use unoffered, NEEDS_8BITMIME means that the content must be checked; and SMTPUTF8 is checked for the
    reverse-path alone: recipients and content may need it all the same.

    DSN is never needed: its parameters are left out if the upstream does not offer it (RFC 3461 5.2.2 allows that).
    """
    if not mail.reverse_path.isascii() and "SMTPUTF8" not in upstream.keywords:
        return replies.UPSTREAM_LACKS_SMTPUTF8
    if not mail.reverse_path:
        # "When the MAIL FROM return-path is empty, the REQUIRETLS parameter SHOULD NOT cause a bounce message to be
        # discarded" (RFC 8689 5): it is requested if offered.
        mail = mail._replace(require_tls=False)
    missing = None if mail[2:] == BEYOND_SIZE else _missing_use(mail[2:], upstream.keywords, is_tls)
    is_too_big = mail.size is not None and upstream.size and mail.size > upstream.size
    return replies.MESSAGE_TOO_BIG if is_too_big and missing in (None, replies.NEEDS_8BITMIME) else missing


@lru_cache(maxsize=256)
def _missing_use(beyond_size: tuple[Any, ...], offered: frozenset[str], is_tls: bool) -> Reply | None:
    """`missing_extension` for the fields behind the size in a `Mail`, which are the same for nearly all mails of a
    client.
    """
    passing: Reply | None = None
    for row, place, value in _NEEDING_USES:
        given = beyond_size[place]
        if given is None or given is False or (value is not None and given is not value):
            continue
        if row.keyword in offered and (is_tls or not row.needs_tls):
            continue
        if not row.is_taken_unoffered:
            return row.lacking
        passing = row.lacking
    return passing


def mail_with(reverse_path: str, parameters: str) -> Mail:
    """Make a `Mail` from a reverse-path and the text behind it.

    Args:
        reverse_path: the mailbox, "" for the null path.
        parameters: the rest of the line behind the path: no control octets, separated by spaces, may be "".

    Raises:
        ParameterRefused: 555 for an unknown parameter, 501 for one that is malformed or given twice.
    """
    return Mail(reverse_path, **_read(parameters, _MAIL_PARAMETERS))


def recipient_with(address: str, parameters: str) -> Recipient:
    """Make a `Recipient` from an address and the text behind it; arguments and errors as for `mail_with`."""
    return Recipient(address, **_read(parameters, _RCPT_PARAMETERS))


def _offered_size(words: Sequence[str]) -> int:
    """0: "no fixed maximum message size is in force" (RFC 1870 4), or an unreadable size."""
    return next((int(word) for word in words if word.isdecimal() and len(word) <= 20), 0)


def _size_words(size: int | None) -> str | None:
    return None if size is None else str(size)


def _read_mechanisms(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.upper() for word in words))


def _mechanism_words(mechanisms: Sequence[str]) -> str | None:
    return " ".join(mechanisms) or None


def _read_limits(words: Sequence[str]) -> Mapping[str, int]:
    pairs = (word.partition("=") for word in words)
    return MappingProxyType(
        {name.upper(): int(value) for name, _, value in pairs if value.isdecimal() and 0 < len(value) <= 6}
    )


def _limit_words(limits: Mapping[str, int]) -> str | None:
    return " ".join(f"{name}={value}" for name, value in limits.items() if 0 < value <= MAX_LIMIT_VALUE) or None


EXTENSIONS: Final = (
    Extension("PIPELINING", "pipelining", can_be_disabled=True),
    Extension(
        "SIZE",
        "size",
        mail=(Parameter("SIZE", "size", read_size),),
        is_relayed=True,
        can_be_disabled=True,
        read=_offered_size,
        words=_size_words,
    ),
    Extension(
        "8BITMIME",
        "eight_bit_mime",
        mail=(Parameter("BODY", "body", read_body),),
        body=Body.EIGHT_BIT_MIME,
        is_relayed=True,
        can_be_disabled=True,
        # Libraries send BODY=8BITMIME regardless of the offer, mostly with 7-bit content. The content decides once it
        # is there.
        is_taken_unoffered=True,
        lacking=replies.NEEDS_8BITMIME,
    ),
    Extension(
        "SMTPUTF8",
        "smtputf8",
        mail=(Parameter("SMTPUTF8", "smtputf8", read_flag),),
        needs="8BITMIME",  # RFC 6531 3.1 item 8
        is_relayed=True,
        can_be_disabled=True,
        # Likewise an all-ASCII mail does not need it, and is sent without it. Other addresses are noticed at MAIL or
        # RCPT, other content at its end.
        is_taken_unoffered=True,
    ),
    Extension("ENHANCEDSTATUSCODES", "enhanced_status_codes"),
    Extension("CHUNKING", "chunking", can_be_disabled=True),
    Extension(
        "BINARYMIME",
        "binary_mime",
        body=Body.BINARY_MIME,
        needs="CHUNKING",  # RFC 3030 3
        is_relayed=True,
        can_be_disabled=True,
        lacking=replies.UPSTREAM_LACKS_BINARYMIME,
    ),
    Extension(
        "DSN",
        "dsn",
        mail=(Parameter("RET", "ret", read_ret), Parameter("ENVID", "envid", read_envid)),
        recipient=(Parameter("NOTIFY", "notify", read_notify, notify_text), Parameter("ORCPT", "orcpt", read_orcpt)),
        is_relayed=True,
        can_be_disabled=True,
    ),
    Extension("STARTTLS", "starttls"),
    Extension(
        "AUTH",
        "auth_mechanisms",
        mail=(Parameter("AUTH", "auth", read_auth),),
        read=_read_mechanisms,
        words=_mechanism_words,
    ),
    Extension(
        "REQUIRETLS",
        "require_tls",
        mail=(Parameter("REQUIRETLS", "require_tls", read_flag),),
        needs_tls=True,  # RFC 8689 2
        is_relayed=True,
        can_be_disabled=True,
        lacking=replies.UPSTREAM_LACKS_REQUIRETLS,
    ),
    Extension("LIMITS", "limits", can_be_disabled=True, read=_read_limits, words=_limit_words),
)
"""Every known extension, in the order of the EHLO reply."""

NONE: Final = Extensions()
"""The offer of a server that knows only HELO."""

OF_MAIL: Final = tuple((row, one, Mail._fields.index(one.field)) for row in EXTENSIONS for one in row.mail)
"""Every parameter of MAIL, with its extension and the index of its field in a `Mail`."""

OF_RECIPIENT: Final = tuple(
    (row, one, Recipient._fields.index(one.field)) for row in EXTENSIONS for one in row.recipient
)
"""Every parameter of RCPT, likewise."""

WITHOUT_PARAMETERS: Final = Mail("")[1:]
"""The fields behind the reverse-path in a `Mail` without parameters."""

BEYOND_SIZE: Final = Mail("")[2:]
"""The fields behind reverse-path and size in most `Mail`s: no extension is used."""

CAN_BE_DISABLED: Final = tuple(row.keyword for row in EXTENSIONS if row.can_be_disabled)
"""Extensions of an upstream that the gateway can do without."""

# Each extension with the index of the `Mail` field that uses it, and the value that means so; None: any value.
_USES: Final[Sequence[tuple[Extension, int, Body | None]]] = tuple(
    (row, Mail._fields.index(name), row.body)
    for row in EXTENSIONS
    for name in (["body"] if row.body is not None else [parameter.field for parameter in row.mail])
)
# Extensions refused unless offered, and extensions that an upstream must offer.
_REFUSABLE_USES: Final = tuple(use for use in _USES if not use[0].is_taken_unoffered)
# These indexes count from behind the size.
_NEEDING_USES: Final = tuple(
    (row, place - len(Mail._fields) + len(BEYOND_SIZE), value) for row, place, value in _USES if row.lacking is not None
)
_MAIL_PARAMETERS: Final = {parameter.keyword: parameter for _, parameter, _ in OF_MAIL}
_RCPT_PARAMETERS: Final = {parameter.keyword: parameter for _, parameter, _ in OF_RECIPIENT}


def _read(parameters: str, known: Mapping[str, Parameter]) -> dict[str, Any]:
    """Field name and value of each parameter in `parameters`."""
    values: dict[str, Any] = {}
    for parameter in parameters.split(" "):
        if not parameter:
            continue  # more than one space: deployed servers take it
        match = _PARAMETER.fullmatch(parameter)
        if match is None:
            raise ParameterRefused(replies.BAD_ARGUMENT)
        meant = known.get(match[1].upper())
        if meant is None:
            raise ParameterRefused(replies.UNKNOWN_PARAMETER)
        if meant.field in values:
            raise ParameterRefused(replies.BAD_ARGUMENT)
        try:
            values[meant.field] = meant.read(match[2])
        except ValueError:
            raise ParameterRefused(replies.BAD_ARGUMENT) from None
    return values
