"""Commands: a command line becomes a typed command, or the reply that refuses it (RFC 5321 4.1.1).

Theory of operation
-------------------
Most lines that a relay sees are MAIL and RCPT with a short ASCII mailbox; one regular expression each takes them whole.
Everything else goes through `parse_by_grammar`, which also accepts every line that the expressions accept and gives the
same result for it: the tests compare the two. The expressions are possessive and never backtrack.

Rules that hold for every line:

* The verb ends at the first space; case does not matter. An unknown verb gets 500, whatever follows.
* Blanks (space, TAB) at the end of a line are dropped (RFC 5321 4.1.1: "SMTP receivers SHOULD tolerate trailing white
  space"). Any other control octet, a TAB inside the line included, gets 501: in SMTP's grammar only the space
  separates, and a server that accepts TAB too would split the line into other arguments than we do.
* A non-ASCII line must be UTF-8 (RFC 6531 3.3). No reply ever repeats an octet of an argument.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import ClassVar, Final, NamedTuple

from otel_smtp.smtp import replies
from otel_smtp.smtp.characters import INVISIBLE
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.extensions import ParameterRefused, mail_with, recipient_with
from otel_smtp.smtp.paths import (
    MAX_DOMAIN_OCTETS,
    BareLocalPart,
    PathSyntaxError,
    PathTooLong,
    forward_path,
    reverse_path,
)
from otel_smtp.smtp.replies import Reply


class Verb(StrEnum):
    """The verbs that the gateway knows; telemetry calls any other "other"."""

    HELO = "HELO"
    EHLO = "EHLO"
    LHLO = "LHLO"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    BDAT = "BDAT"
    RSET = "RSET"
    NOOP = "NOOP"
    QUIT = "QUIT"
    VRFY = "VRFY"
    EXPN = "EXPN"
    HELP = "HELP"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"


class CommandRefused(Exception):
    """A command line that is refused.

    Attributes:
        verb: the verb, None if it is unknown.
        reply: what to answer.
    """

    def __init__(self, verb: Verb | None, reply: Reply) -> None:
        super().__init__(f"{verb or 'other'}: {reply}")
        self.verb = verb
        self.reply = reply


class DomainMissing(CommandRefused):
    """A MAIL or RCPT whose address is a bare local part; the rest of the line has not been checked."""

    def __init__(self, verb: Verb, reply: Reply, before: str, behind: str) -> None:
        super().__init__(verb, reply)
        self._before = before
        self._behind = behind

    def with_domain(self, domain: str) -> "Command":
        """The command with "@" and `domain` added behind the local part.

        Raises:
            CommandRefused: the completed line is refused too.
        """
        return parse_by_grammar(f"{self.verb} {self._before}@{domain}{self._behind}".encode())


@dataclass(frozen=True, slots=True)
class Hello:
    """HELO, EHLO or LHLO (RFC 5321 4.1.1.1, RFC 2033 4.1)."""

    verb: Verb
    name: str  # visible, at most 255 octets, not always a host name: a claim of the peer's that proves nothing


@dataclass(frozen=True, slots=True)
class MailFrom:
    """MAIL (RFC 5321 4.1.1.2)."""

    verb: ClassVar[Verb] = Verb.MAIL
    mail: Mail


@dataclass(frozen=True, slots=True)
class RcptTo:
    """RCPT (RFC 5321 4.1.1.3). The engine judges a non-ASCII address: it knows whether MAIL had SMTPUTF8."""

    verb: ClassVar[Verb] = Verb.RCPT
    recipient: Recipient


@dataclass(frozen=True, slots=True)
class Data:
    """DATA (RFC 5321 4.1.1.4)."""

    verb: ClassVar[Verb] = Verb.DATA


@dataclass(frozen=True, slots=True)
class Bdat:
    """BDAT (RFC 3030 2)."""

    verb: ClassVar[Verb] = Verb.BDAT
    size: int  # octets of the chunk that follows: up to twenty digits, not yet checked against any limit
    last: bool


@dataclass(frozen=True, slots=True)
class Auth:
    """AUTH (RFC 4954 4)."""

    verb: ClassVar[Verb] = Verb.AUTH
    mechanism: str  # upper case; has the form of a SASL name, known or not
    initial_response: str | None = field(repr=False)  # as given: base64, not yet decoded, or "="


@dataclass(frozen=True, slots=True)
class StartTls:
    """STARTTLS (RFC 3207 4)."""

    verb: ClassVar[Verb] = Verb.STARTTLS


@dataclass(frozen=True, slots=True)
class Rset:
    """RSET (RFC 5321 4.1.1.5)."""

    verb: ClassVar[Verb] = Verb.RSET


@dataclass(frozen=True, slots=True)
class Noop:
    """NOOP (RFC 5321 4.1.1.9)."""

    verb: ClassVar[Verb] = Verb.NOOP


@dataclass(frozen=True, slots=True)
class Quit:
    """QUIT (RFC 5321 4.1.1.10)."""

    verb: ClassVar[Verb] = Verb.QUIT


@dataclass(frozen=True, slots=True)
class Vrfy:
    """VRFY (RFC 5321 4.1.1.6); its argument is not kept, so that no answer can depend on it."""

    verb: ClassVar[Verb] = Verb.VRFY


@dataclass(frozen=True, slots=True)
class Expn:
    """EXPN (RFC 5321 4.1.1.7)."""

    verb: ClassVar[Verb] = Verb.EXPN


@dataclass(frozen=True, slots=True)
class Help:
    """HELP (RFC 5321 4.1.1.8)."""

    verb: ClassVar[Verb] = Verb.HELP


Command = Hello | MailFrom | RcptTo | Data | Bdat | Auth | StartTls | Rset | Noop | Quit | Vrfy | Expn | Help

_MAILBOX = (
    rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
    rb"@[A-Za-z0-9]+(?:(?:\.|-+)[A-Za-z0-9]+)*"
)
_COMMON_MAIL = re.compile(
    rb"(?i:MAIL FROM:)<(%b)>(?: (?i:SIZE)=([0-9]{1,20}))?(?: (?i:BODY)=(7BIT|8BITMIME))?( (?i:SMTPUTF8))?\r\n"
    % _MAILBOX
)
_COMMON_RCPT = re.compile(rb"(?i:RCPT TO:)<(%b)>\r\n" % _MAILBOX)
_COMMON_MAILBOX_OCTETS: Final = 64  # so short that neither local part nor label nor path can be over its limit
_COMMON_BODIES: Final[Mapping[bytes, Body]] = {
    b"7BIT": Body.SEVEN_BIT,
    b"8BITMIME": Body.EIGHT_BIT_MIME,
}

_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_FROM = re.compile(r"FROM: *", re.IGNORECASE | re.ASCII)
_TO = re.compile(r"TO: *", re.IGNORECASE | re.ASCII)
_CHUNK = re.compile(rb"([0-9]{1,20})(?: +(LAST))?", re.IGNORECASE)
# sasl-mech = 1*20mech-char (RFC 4422 3.1); the initial response is base64 or "=", judged when it is decoded
_AUTH = re.compile(rb"([A-Za-z0-9_-]{1,20})(?: +([!-~]+))?")
_ALONE: Final[Mapping[bytes, Command]] = {
    b"DATA\r\n": Data(),
    b"QUIT\r\n": Quit(),
    b"RSET\r\n": Rset(),
    b"NOOP\r\n": Noop(),
}
COMMON_LINES: Final[Mapping[bytes, Command]] = {**_ALONE, **{line.lower(): command for line, command in _ALONE.items()}}
"""Lines without arguments, as nearly all clients write them; smtplib writes lower case."""
DATA_LINES: Final = frozenset(line for line, command in COMMON_LINES.items() if command.verb is Verb.DATA)

# A NamedTuple's own constructor is a function in Python; each mail has one `Mail` and at least one `Recipient`.
_new: Final = tuple.__new__


def common_recipient(line: bytes) -> Recipient | None:
    """The recipient of a RCPT with a short ASCII mailbox and nothing else; None unless `line` is exactly such a line
    with its CRLF.
    """
    match = _COMMON_RCPT.fullmatch(line)
    if match is None or len(mailbox := match[1]) > _COMMON_MAILBOX_OCTETS:
        return None
    return _new(Recipient, (mailbox.decode(), None, None))


def common_mail(line: bytes) -> Mail | None:
    """The mail of a MAIL with a short ASCII mailbox, and at most SIZE, BODY and SMTPUTF8 in this order; None otherwise,
    as in `common_recipient`.
    """
    match = _COMMON_MAIL.fullmatch(line)
    if match is None:
        return None
    mailbox, size, body, smtputf8 = match.groups()
    if len(mailbox) > _COMMON_MAILBOX_OCTETS:
        return None
    return _new(
        Mail,
        (
            mailbox.decode(),
            None if size is None else int(size),
            None if body is None else _COMMON_BODIES[body],
            smtputf8 is not None,
            None,
            None,
            False,
            None,
        ),
    )


def parse_by_grammar(line: bytes) -> Command:
    """Parse any command line.

    Args:
        line: a command line without its CRLF, any octets, of bounded length.

    Raises:
        CommandRefused: the line is no command, or its arguments are wrong.
    """
    line = line.rstrip(b" \t")
    head, _, argument = line.partition(b" ")
    known = _COMMANDS.get(head.upper())
    if known is None:
        # "QUIT" NUL "x" is a known verb with a control octet, not an unknown verb.
        known = _COMMANDS.get(_CONTROL.split(head, maxsplit=1)[0].upper())
        if known is None:
            raise CommandRefused(None, replies.UNKNOWN_COMMAND)
    verb, parse = known
    if _CONTROL.search(line) is not None:
        raise CommandRefused(verb, replies.CONTROL_OCTETS)
    return parse(verb, argument.lstrip(b" "))


def _hello(verb: Verb, argument: bytes) -> Hello:
    """Any name is accepted: RFC 5321 4.1.4 "a server MUST NOT refuse to accept a message" for it, and libraries send
    names with blanks, brackets, slashes and worse. It is cleaned because people see it.
    """
    if not argument:
        raise CommandRefused(verb, replies.BAD_ARGUMENT)
    return Hello(verb, _cleaned_name(argument))


@lru_cache(maxsize=256)  # the many connections of an application share one name
def _cleaned_name(argument: bytes) -> str:
    name = INVISIBLE.sub("?", argument.decode("utf-8", "replace"))
    return name.encode()[:MAX_DOMAIN_OCTETS].decode("utf-8", "ignore")


def _mail(verb: Verb, argument: bytes) -> MailFrom:
    text = _decoded(verb, argument, otherwise=replies.BAD_SENDER)
    mailbox, parameters = _path(verb, text, _FROM, reverse_path, _BAD_SENDER)
    try:
        mail = mail_with(mailbox, parameters)
    except ParameterRefused as refused:
        raise CommandRefused(verb, refused.reply) from None
    if not mail.smtputf8 and not mailbox.isascii():
        raise CommandRefused(verb, replies.NEEDS_SMTPUTF8)
    return MailFrom(mail)


def _rcpt(verb: Verb, argument: bytes) -> RcptTo:
    text = _decoded(verb, argument, otherwise=replies.BAD_RECIPIENT)
    mailbox, parameters = _path(verb, text, _TO, forward_path, _BAD_RECIPIENT)
    try:
        return RcptTo(recipient_with(mailbox, parameters))
    except ParameterRefused as refused:
        raise CommandRefused(verb, refused.reply) from None


class _BadAddress(NamedTuple):
    """The reply to a malformed address."""

    syntax: Reply
    too_long: Reply
    no_domain: Reply


_BAD_SENDER: Final = _BadAddress(replies.BAD_SENDER, replies.SENDER_TOO_LONG, replies.SENDER_WITHOUT_DOMAIN)
_BAD_RECIPIENT: Final = _BadAddress(replies.BAD_RECIPIENT, replies.RECIPIENT_TOO_LONG, replies.RECIPIENT_WITHOUT_DOMAIN)


def _path(
    verb: Verb, text: str, label: re.Pattern[str], take: Callable[[str, int], tuple[str, int]], bad: _BadAddress
) -> tuple[str, str]:
    """Parse the mailbox behind `label`; returns it and the text behind the path."""
    match = label.match(text)
    if match is None:
        raise CommandRefused(verb, replies.BAD_ARGUMENT)
    try:
        mailbox, end = take(text, match.end())
    except PathTooLong:
        raise CommandRefused(verb, bad.too_long) from None
    except BareLocalPart as bare:
        at = bare.local_part_end
        raise DomainMissing(verb, bad.no_domain, text[:at], text[at:]) from None
    except PathSyntaxError:
        raise CommandRefused(verb, bad.syntax) from None
    if end < len(text) and text[end] != " ":
        raise CommandRefused(verb, bad.syntax)
    return mailbox, text[end:]


def _bdat(verb: Verb, argument: bytes) -> Bdat:
    match = _CHUNK.fullmatch(argument)
    if match is None:
        raise CommandRefused(verb, replies.BAD_ARGUMENT)
    return Bdat(int(match[1]), match[2] is not None)


def _auth(verb: Verb, argument: bytes) -> Auth:
    match = _AUTH.fullmatch(argument)
    if match is None:
        raise CommandRefused(verb, replies.BAD_ARGUMENT)
    initial_response = None if match[2] is None else match[2].decode("ascii")
    return Auth(match[1].decode("ascii").upper(), initial_response)


def _vrfy(verb: Verb, argument: bytes) -> Vrfy:
    if not argument:
        raise CommandRefused(verb, replies.BAD_ARGUMENT)
    return Vrfy()


def _alone(command: Command) -> Callable[[Verb, bytes], Command]:
    def parse(verb: Verb, argument: bytes) -> Command:
        # STARTTLS most of all: RFC 3207 4 forbids arguments, and they were sent in the clear.
        if argument:
            raise CommandRefused(verb, replies.BAD_ARGUMENT)
        return command

    return parse


def _with_anything(command: Command) -> Callable[[Verb, bytes], Command]:
    # The argument of NOOP and HELP has no meaning (RFC 5321 4.1.1.9: "the parameter ... is ignored"); EXPN is refused
    # whatever it asks.
    return lambda verb, argument: command


def _decoded(verb: Verb, argument: bytes, *, otherwise: Reply) -> str:
    try:
        return argument.decode("utf-8")
    except UnicodeDecodeError:
        raise CommandRefused(verb, otherwise) from None


_PARSERS: Final[Mapping[Verb, Callable[[Verb, bytes], Command]]] = {
    Verb.HELO: _hello,
    Verb.EHLO: _hello,
    Verb.LHLO: _hello,
    Verb.MAIL: _mail,
    Verb.RCPT: _rcpt,
    Verb.DATA: _alone(Data()),
    Verb.BDAT: _bdat,
    Verb.RSET: _alone(Rset()),
    Verb.NOOP: _with_anything(Noop()),
    Verb.QUIT: _alone(Quit()),
    Verb.VRFY: _vrfy,
    Verb.EXPN: _with_anything(Expn()),
    Verb.HELP: _with_anything(Help()),
    Verb.STARTTLS: _alone(StartTls()),
    Verb.AUTH: _auth,
}
_COMMANDS: Final = {verb.encode("ascii"): (verb, parse) for verb, parse in _PARSERS.items()}
