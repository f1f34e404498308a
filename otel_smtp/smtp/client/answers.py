"""Replies of an upstream: reading them, and the steps that they answer."""

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import lru_cache, partial
from typing import Final, NamedTuple, overload

from otel_smtp.smtp import replies
from otel_smtp.smtp.errors import RemoteProtocolError
from otel_smtp.smtp.replies import EnhancedStatus, ErrorType, Reply, safe_text

MAX_REPLY_LINE_OCTETS: Final = 2048  # RFC 5321 4.5.3.1.5 says 512; upstreams that put long texts there exist
MAX_REPLY_LINES: Final = 100
MAX_KEPT_LINES: Final = 10  # of a refusal passed on to the client; MAX_KEPT_CHARACTERS bounds the text of each line
MAX_KEPT_CHARACTERS: Final = 480  # with code, enhanced code and CRLF within the 512 octets of RFC 5321 4.5.3.1.5


class Awaited(StrEnum):
    """The steps that a reply can answer."""

    __hash__ = str.__hash__  # Enum's own is a Python function; this is called for each reply

    GREETING = "greeting"  # the connection itself
    EHLO = "EHLO"  # HELO and LHLO too
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"  # each step of the exchange
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    CONTENT = "content"  # the final dot, or BDAT LAST: the reply to the message
    RSET = "RSET"
    QUIT = "QUIT"


# Looking a member up in its Enum costs as much as a call; code that runs for each mail uses these.
MAIL: Final = Awaited.MAIL
RCPT: Final = Awaited.RCPT
DATA: Final = Awaited.DATA
CONTENT: Final = Awaited.CONTENT
RSET: Final = Awaited.RSET


class Answer(NamedTuple):
    """One reply and what it answers; `verb` is None for an unsolicited 421."""

    verb: Awaited | None
    reply: Reply


# A NamedTuple's own constructor is a function in Python; a mail has three answers or more.
answer_of: Final = partial(tuple.__new__, Answer)

_OF_TRANSACTION: Final = frozenset({MAIL, RCPT, DATA, CONTENT})


class ExchangeAnswers(Sequence[Answer]):
    """The answers of an exchange, in order, and their summary. Immutable, so recurring answers share one object.

    Attributes:
        steps: those to MAIL, RCPT, DATA and the content; of recipients answered alike in a row, only the last.
        verdicts: the replies to RCPT. `accepted`: how many of them are 2yz.
        contents: the replies to the content.
        refusal: the first refusal of MAIL or a recipient; None if neither was refused.
        begins_with_reset: the first answer is to RSET.
    """

    __slots__ = ("_each", "accepted", "begins_with_reset", "contents", "refusal", "steps", "verdicts")

    def __init__(self, each: Iterable[Answer]) -> None:
        self._each = each = tuple(each)
        self.verdicts = tuple([reply for verb, reply in each if verb is RCPT])
        self.contents = tuple([reply for verb, reply in each if verb is CONTENT])
        self.accepted = sum([verdict.code < 400 for verdict in self.verdicts])
        refusals = (reply for verb, reply in each if reply.code >= 400 and (verb is MAIL or verb is RCPT))
        self.refusal = next(refusals, None)
        self.begins_with_reset = bool(each) and each[0].verb is RSET
        steps: list[Answer] = []
        for answer in each:
            verb, reply = answer
            if verb is RCPT and steps and steps[-1].verb is RCPT and steps[-1].reply.code == reply.code:
                steps[-1] = answer
            elif verb in _OF_TRANSACTION:
                steps.append(answer)
        self.steps = tuple(steps)

    def __repr__(self) -> str:
        return f"<ExchangeAnswers {' '.join(f'{verb}:{reply.code}' for verb, reply in self._each)}>"

    def __len__(self) -> int:
        return len(self._each)

    @overload
    def __getitem__(self, place: int) -> Answer: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[Answer, ...]: ...

    def __getitem__(self, place: int | slice) -> Answer | tuple[Answer, ...]:
        return self._each[place]


NO_ANSWERS: Final = ExchangeAnswers(())


def challenge_of(reply: Reply) -> bytes:
    """The octets of a 334 challenge.

    Raises:
        RemoteProtocolError: they are not base64.
    """
    try:
        return base64.b64decode(reply.lines[0], validate=True)
    except (binascii.Error, ValueError):
        raise RemoteProtocolError("challenge is not base64", replies.UPSTREAM_PROTOCOL) from None


REPLY_LINE: Final = re.compile(rb"([2-5][0-9]{2})(?:([ -])(.*))?", re.DOTALL)
MOST_CACHED_OCTETS: Final = 128  # of a line, line end included


@lru_cache(maxsize=256)
def read_reply(line: bytes) -> Reply | None:
    """The reply in a line of at most `MOST_CACHED_OCTETS`, line end included; None if it is not a whole reply.

    The few that recur are made once; replies are immutable.
    """
    line = without_end(line)
    match = REPLY_LINE.fullmatch(line)
    return make_reply((line,)) if match is not None and match[2] != b"-" else None


# Of the answers to one mail's few commands, which are parsed and cached as a whole.
MOST_KNOWN_OCTETS: Final = 512
MOST_KNOWN_ANSWERS: Final = 8
_ORDINARY: Final = frozenset({MAIL, RCPT, CONTENT, RSET})


class KnownAnswers(NamedTuple):
    """The answers in one read.

    Attributes:
        begins_anew: earlier recipients no longer count. `accepted`: how many were accepted since.
    """

    answers: ExchangeAnswers
    begins_anew: bool
    accepted: int


@lru_cache(maxsize=256)
def read_answers(data: bytes, verbs: tuple[Awaited, ...]) -> KnownAnswers | None:
    """The answers to `verbs`, if `data` is one short line for each of them and nothing more.

    Upstreams repeat themselves, and no reply is parsed twice.

    Returns:
        None for anything else: other data, a command that not every mail has, or a reply that needs more than to be
        noted. Content is taken to have one reply, as in SMTP.
    """
    *lines, rest = data.split(b"\n")
    if rest or not verbs or len(lines) != len(verbs) or not _ORDINARY.issuperset(verbs):
        return None
    answers: list[Answer] = []
    begins_anew, accepted = False, 0
    for verb, line in zip(verbs, lines, strict=True):
        reply = read_reply(line + b"\n") if len(line) < MOST_CACHED_OCTETS else None
        if reply is None or 300 <= reply.code < 400 or reply.code == 421:
            return None
        if verb is RCPT:
            accepted += reply.code < 400
        else:
            begins_anew, accepted = True, 0
        answers.append(answer_of((verb, reply)))
    return KnownAnswers(ExchangeAnswers(answers), begins_anew, accepted)


def without_end(line: bytes) -> bytes:
    """A line without its final LF or CRLF."""
    return line[:-1].removesuffix(b"\r")


def make_reply(lines: Sequence[bytes]) -> Reply:
    """A reply that is safe to repeat: printable ASCII, bounded, its enhanced code of the class of its code."""
    code = int(lines[0][:3])
    # Challenges are kept whole: their text is for a mechanism, not for people.
    limit = MAX_KEPT_CHARACTERS if code != 334 else MAX_REPLY_LINE_OCTETS
    texts = [safe_text(line[4:].decode("latin-1"), limit=limit) for line in lines[:MAX_KEPT_LINES]]
    enhanced: EnhancedStatus | None = None
    if code // 100 != 3:
        enhanced, first = EnhancedStatus.parse(texts[0])
        if enhanced is not None:
            # RFC 2034 4: each line has the code; it stands once in our value.
            texts = [first, *(EnhancedStatus.parse(text)[1] for text in texts[1:])]
            if enhanced.klass != code // 100:
                enhanced = enhanced._replace(klass=code // 100)  # RFC 2034 4: the class must match the reply's
    error_type = ErrorType.UPSTREAM_REFUSED if code >= 400 else None
    return Reply(code, enhanced, tuple(texts), error_type)
