"""ClientProtocol: our side of the conversation with an upstream, as a value machine.

Theory of operation
-------------------
Commands are *queued*, and `data_to_send` gives out as many of them as may travel now: all of a group where the upstream
offers PIPELINING, up to the command that must end it (RFC 2920 3.1); else one at a time. The driver sends what it is
given, hands every piece that arrives to `receive`, and gets one `Answer` for each command, in order. So the same
strategy is right with and without PIPELINING, and cutting what arrives differently changes nothing.

Replies are bounded, and matched to commands by order alone. Whatever does not fit (a reply that nobody asked for, a
class that the command cannot have, a line that is no reply, octets behind the 220 of STARTTLS) is a fault of the
upstream: `fault` is set, and the engine takes nothing more, as one reply too many would make every following answer
that of another command. Answers that came before the fault stay true: a reply that has been read counts.

One writer makes every command line. It refuses what could end the line, open another path or smuggle a parameter. That
is `LocalProtocolError`, as such an argument should have been refused long before; `is_safe_path` is how.

Content is put into wire form here: dots are stuffed for DATA, or the octets are counted for BDAT. A piece in which
there is nothing to stuff is passed on as it is, uncopied.
"""

import base64
import binascii
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Final, NamedTuple, Self

from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Notify, Recipient
from otel_smtp.smtp.errors import LocalProtocolError, RemoteProtocolError
from otel_smtp.smtp.replies import EnhancedStatus, ErrorType, Reply, safe_text

MAX_REPLY_LINE_OCTETS: Final = 2048  # RFC 5321 4.5.3.1.5 says 512; upstreams that put long texts there exist
MAX_REPLY_LINES: Final = 100
MAX_KEPT_LINES: Final = 10  # of a refusal that is passed on; the text of one line is bounded by MAX_KEPT_CHARACTERS
MAX_KEPT_CHARACTERS: Final = 480  # with code, enhanced code and CRLF within the 512 octets of RFC 5321 4.5.3.1.5


class Verb(StrEnum):
    """What a reply can answer."""

    __hash__ = str.__hash__  # of Enum it is a function of Python, called for each reply

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


# The classes of codes that make sense (RFC 5321 4.3.2): 4yz and 5yz always do.
_DONE: Final = frozenset({2, 4, 5})
_CLASSES: Final[Mapping[Verb, frozenset[int]]] = {
    **dict.fromkeys(Verb, _DONE),
    Verb.DATA: frozenset({3, 4, 5}),
    Verb.AUTH: frozenset({2, 3, 4, 5}),
}
# RFC 2920 3.1: "can only appear as the last command in a group, since their success or failure produces a change of
# state which the client SMTP must accommodate". The last chunk ends a group since nothing may follow it unanswered.
_ENDS_GROUP: Final = frozenset({Verb.GREETING, Verb.EHLO, Verb.STARTTLS, Verb.AUTH, Verb.DATA, Verb.CONTENT, Verb.QUIT})

_REPLY_LINE: Final = re.compile(rb"([2-5][0-9]{2})(?:([ -])(.*))?", re.DOTALL)
# What anyone takes for the end of a line, and lone surrogates, which no octets stand for.
_CONTROL: Final = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_CONTROLS: Final = re.compile(f"[{_CONTROL}]")
# A path as RFC 5321 4.1.2 lets it look to a reader that searches its end: blanks and angle brackets only within the
# quotes of the local part, nothing that ends a line anywhere. There is one way to read an address by it, so judging one
# takes time in proportion to its length.
_QUOTED: Final = rf'"[^"\\{_CONTROL}]*(?:\\[ -~][^"\\{_CONTROL}]*)*"'
_BARE: Final = rf'[^\s<>"{_CONTROL}]'
_PATH: Final = re.compile(rf"{_QUOTED}(?:@{_BARE}+)?|{_BARE}*")
_PARAMETER_VALUE: Final = re.compile(r"[^\s\x00-\x20\x7f]+")


def is_safe_path(address: str) -> bool:
    """Whether `address` can stand between the angle brackets of MAIL and RCPT without being read as anything else."""
    return _PATH.fullmatch(address) is not None


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
    def parse(cls, lines: Sequence[str]) -> Self:
        """Read the keyword lines of an EHLO reply: all but its first line. What is not understood is left out."""
        words: dict[str, list[str]] = {}
        for line in lines:
            # AUTH=LOGIN is how it was announced before RFC 2554; some servers still say both.
            keyword, *values = (
                line.replace("=", " ", 1).split() if line[:5].upper() == "AUTH=" else line.split() or [""]
            )
            words.setdefault(keyword.upper(), []).extend(values)
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


class Answer(NamedTuple):
    """One reply and what it answers; `verb` is None for a 421 that nobody had asked for."""

    verb: Verb | None
    reply: Reply


# A NamedTuple's own constructor is a function in Python; a mail has three answers or more.
_answer: Final = partial(tuple.__new__, Answer)


class ClientProtocol:
    """The client's side of one connection to an upstream.

    Args:
        is_lmtp: LHLO instead of EHLO, and a reply for each accepted recipient after the content (RFC 2033 4.2).
        max_reply_line_octets: longest reply line, its line end included.
        max_reply_lines: most lines of one reply.

    Attributes:
        extensions: those of the last EHLO; none before it, after HELO, and from the start of TLS to the next EHLO.
        fault: how the upstream broke the protocol; None while it has not. Close the connection.
        awaited: what the next replies will answer, in order; to be read only.
        queued: commands that `data_to_send` has not given out yet, in order; to be read only.

    Holds at most one reply within its bounds, and what was queued and not sent.
    """

    __slots__ = (
        "_accepted",
        "_chunk_left",
        "_content_left",
        "_is_closing",
        "_is_lmtp",
        "_is_open",
        "_lines",
        "_max_line_octets",
        "_max_lines",
        "_out",
        "_rest",
        "_tail",
        "_tls_is_due",
        "_utf8",
        "awaited",
        "extensions",
        "fault",
        "queued",
    )

    def __init__(
        self,
        *,
        is_lmtp: bool = False,
        max_reply_line_octets: int = MAX_REPLY_LINE_OCTETS,
        max_reply_lines: int = MAX_REPLY_LINES,
    ) -> None:
        self.extensions = Extensions()
        self._is_lmtp = is_lmtp
        self._max_line_octets = max_reply_line_octets
        self._max_lines = max_reply_lines
        self._rest = b""  # what was received and not read: the beginning of a line, or what nobody had asked for
        self._lines: list[bytes] = []  # of the reply that is arriving
        self.queued: deque[tuple[Verb, bytes]] = deque()
        self._out: list[bytes] = []
        self.awaited: deque[Verb] = deque((Verb.GREETING,))
        self._accepted = 0  # recipients of the transaction
        self._chunk_left = 0  # octets of a chunk that is sent in pieces
        self._content_left = 0  # LMTP: replies to the content that are still to come
        self._is_open = False  # 354 was given and the content is not ended
        self._tail = b"\r\n"  # the last two octets of the content: whether the next one begins a line
        self._tls_is_due = False  # 220 to STARTTLS was given: only tls_started may follow
        self._utf8 = False  # MAIL had SMTPUTF8
        self._is_closing = False
        self.fault: RemoteProtocolError | None = None

    def __repr__(self) -> str:
        waits = " ".join(self.awaited) or "nothing"
        return f"<ClientProtocol waits for {waits}, {len(self.queued)} queued{', broken' if self.fault else ''}>"

    # What is asked of it ----------------------------------------------------------------------------------

    @property
    def is_closing(self) -> bool:
        """The upstream said 421: it is closing the connection (RFC 5321 3.8)."""
        return self._is_closing

    @property
    def is_settled(self) -> bool:
        """Every command that was queued has its answer."""
        return not self.awaited and not self.queued

    @property
    def is_in_step(self) -> bool:
        """The connection can serve another transaction: all is answered, and nothing more has arrived."""
        return not (
            self.awaited
            or self.queued
            or self._rest
            or self._lines
            or self._is_open
            or self._chunk_left
            or self._is_closing
            or self.fault is not None
        )

    @property
    def accepted_recipients(self) -> int:
        """Recipients of the open transaction that got a 2yz."""
        return self._accepted

    # Input ------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Answer]:
        """Take octets from the upstream, and give the replies that are whole now, with what they answer.

        Never raises: what breaks the protocol sets `fault`, behind the answers that came before it. It goes no further
        than the answer to the last command; what lies behind is judged by the next call, and until then `is_in_step` is
        false. Nothing is read behind a 421, or a refusal that comes before the content has ended.

        Args:
            data: as read from the network, any length; b"" only judges what has been left over.

        Returns:
            An answer whose verb is None is a 421 that nobody had asked for.
        """
        answers: list[Answer] = []
        if self.fault is not None or self._is_closing:
            return answers
        if self._rest:
            data = self._rest + data
            self._rest = b""
        awaited = self.awaited
        position = 0
        while True:
            if self._tls_is_due and position < len(data):
                # Injection before TLS: it is there to be read as if it had come under TLS.
                self._break("octets behind the 220 of STARTTLS")
                return answers
            end = data.find(b"\n", position) + 1
            if (end or len(data)) - position > self._max_line_octets:
                self._break("reply line too long")
                return answers
            if not end:
                break
            line = data[position : end - 1].removesuffix(b"\r")
            position = end
            match = _REPLY_LINE.fullmatch(line)
            if match is None or (self._lines and self._lines[0][:3] != line[:3]):
                self._break("a line that is no reply")
                return answers
            lines = [line]
            if self._lines or match[2] == b"-":
                lines = self._lines
                lines.append(line)
                if len(lines) > self._max_lines:
                    self._break("reply of too many lines")
                    return answers
                if match[2] == b"-":
                    continue
                self._lines = []
            reply = _read_reply(line) if len(lines) == 1 and len(line) <= 128 else _make_reply(lines)
            code = reply.code
            self._is_closing = code == 421
            if not awaited:
                self._take_unasked(reply, answers)
                return answers
            verb = awaited[0]
            if code // 100 not in _CLASSES[verb]:
                self._break(f"{verb} answered with {code}")
                return answers
            awaited.popleft()
            if verb is Verb.RCPT:
                self._accepted += code < 400
            elif verb is Verb.MAIL or verb is Verb.RSET:
                self._accepted = 0
            elif verb is Verb.CONTENT:
                if not self._settle_content(reply, data[position : position + 3]):
                    return answers
            elif not self._settle(verb, reply, lines, has_surplus=position < len(data)):
                return answers
            answers.append(_answer((verb, reply)))
            if self._is_closing:
                return answers
            if not awaited:
                break
        self._rest = data[position:]
        return answers

    def _take_unasked(self, reply: Reply, answers: list[Answer]) -> None:
        """A reply without a command: a farewell, or a refusal of the content before its end."""
        if reply.code >= 400 and self._is_open:
            self._is_closing = True  # before the end of the content there is no way back
            answers.append(Answer(Verb.CONTENT, reply))
        elif reply.code == 421:
            answers.append(Answer(None, reply))
        else:
            self._break("a reply that nobody had asked for")

    def _settle(self, verb: Verb, reply: Reply, lines: Sequence[bytes], *, has_surplus: bool) -> bool:
        """Note what `reply` changes; whether it stands."""
        match verb:
            case Verb.DATA:
                self._is_open = reply.code < 400
            case Verb.EHLO if reply.is_positive:
                self.extensions = Extensions.parse([line[4:].decode("ascii", "replace") for line in lines[1:]])
            case Verb.STARTTLS:
                self._tls_is_due = reply.is_positive
                if self._tls_is_due and has_surplus:
                    self._break("octets behind the 220 of STARTTLS")
                    return False
            case _:
                pass
        return True

    def _settle_content(self, reply: Reply, surplus: bytes) -> bool:
        """Note what the reply to the content changes; whether it stands. `surplus`: how what lies behind it begins."""
        is_positive = reply.code < 400
        if self._chunk_left and is_positive:
            self._break("content accepted before its end")
            return False
        if self._is_lmtp:
            # RFC 2033 4.2: one reply "for each previously successful RCPT command"; BDAT LAST without any has one 503.
            if self._content_left == 0:
                self._content_left = max(1, self._accepted)
            self._content_left -= 1
            if self._content_left > 0 and reply.code != 421:
                self.awaited.appendleft(Verb.CONTENT)
                return True
            self._content_left = 0
        self._accepted = 0
        # With one reply too many, this one was perhaps not meant for the message, and doubt is never success. What is,
        # or may become, a farewell leaves no doubt.
        if is_positive and not b"421".startswith(surplus):
            self._break("more replies than commands")
            return False
        return True

    def _break(self, what: str) -> RemoteProtocolError:
        """Note how the upstream broke the protocol; nothing is sent or kept any more."""
        self.fault = RemoteProtocolError(what, replies.UPSTREAM_PROTOCOL)
        self.queued.clear()
        self._out.clear()
        return self.fault

    # Output -----------------------------------------------------------------------------------------------

    def data_to_send(self) -> bytes:
        """What may travel now; b"" where the answers to what was sent must come first. Each octet is given once."""
        queued, awaited, out = self.queued, self.awaited, self._out
        while queued:
            if awaited and (not self.extensions.pipelining or awaited[-1] in _ENDS_GROUP):
                break
            verb, octets = queued.popleft()
            awaited.append(verb)
            out.append(octets)
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return data

    def cancel_queued(self) -> int:
        """Take back the commands that were not sent yet; how many there were."""
        count = len(self.queued)
        self.queued.clear()
        return count

    def send_hello(self, name: str) -> None:
        """EHLO, or LHLO to an LMTP server; forgets what the upstream offered before."""
        self._hello("LHLO" if self._is_lmtp else "EHLO", name)

    def send_helo(self, name: str) -> None:
        """HELO, for a server that refused EHLO (RFC 5321 3.2)."""
        self._hello("HELO", name)

    def _hello(self, verb: str, name: str) -> None:
        self.extensions = Extensions()
        self._command(Verb.EHLO, f"{verb} {self._value(name)}")

    def send_starttls(self) -> None:
        """STARTTLS. After its 220 only `tls_started` may follow."""
        self._command(Verb.STARTTLS, "STARTTLS")

    def tls_started(self) -> None:
        """The handshake is done. What the upstream said in clear is forgotten (RFC 3207 4.2): say EHLO again.

        Raises:
            RemoteProtocolError: the upstream sent octets between its 220 and TLS.
            LocalProtocolError: no 220 was given.
        """
        if self.fault is not None:
            raise self.fault
        if not self._tls_is_due:
            raise LocalProtocolError("TLS was not agreed on")
        self._tls_is_due = False
        self.extensions = Extensions()

    def send_auth(self, mechanism: str, initial_response: bytes | None = None) -> None:
        """AUTH (RFC 4954 4). An answer with code 334 is a challenge: see `challenge_of` and `send_auth_response`."""
        line = f"AUTH {self._value(mechanism)}"
        if initial_response is not None:
            line += f" {base64.b64encode(initial_response).decode('ascii') or '='}"
        self._command(Verb.AUTH, line)

    def send_auth_response(self, response: bytes) -> None:
        """The answer to a challenge."""
        self._command(Verb.AUTH, base64.b64encode(response).decode("ascii"))

    def send_mail(self, mail: Mail, *, size: int | None = None) -> None:
        """MAIL, with those of its parameters that the upstream offers.

        Args:
            size: octets of the content, where it is known better than the client said.

        Raises:
            LocalProtocolError: an address or parameter that must not stand in a command.
        """
        offered = self.extensions
        self._utf8 = mail.smtputf8 and offered.smtputf8
        if _PATH.fullmatch(mail.reverse_path) is None:
            raise LocalProtocolError("unsafe path in a command")
        line = [f"MAIL FROM:<{mail.reverse_path}>"]
        size = mail.size if size is None else size
        if size is not None and offered.offers_size:
            line.append(f"SIZE={size:d}")
        if mail.body is not None and offered.eight_bit_mime:
            line.append(f"BODY={mail.body}")
        if self._utf8:
            line.append("SMTPUTF8")
        if offered.dsn and mail.ret is not None:
            line.append(f"RET={mail.ret}")
        if offered.dsn and mail.envid is not None:
            line.append(f"ENVID={self._value(mail.envid)}")
        if offered.auth and mail.auth is not None:
            line.append(f"AUTH={self._value(mail.auth)}")
        if offered.require_tls and mail.require_tls:
            line.append("REQUIRETLS")
        self._command(Verb.MAIL, " ".join(line))

    def send_recipient(self, recipient: Recipient) -> None:
        """RCPT, with those of its parameters that the upstream offers; errors as `send_mail`."""
        if _PATH.fullmatch(recipient.address) is None:
            raise LocalProtocolError("unsafe path in a command")
        line = f"RCPT TO:<{recipient.address}>"
        if self.extensions.dsn and recipient.notify is not None:
            line += f" NOTIFY={','.join(flag.name or '' for flag in Notify if flag in recipient.notify)}"
        if self.extensions.dsn and recipient.orcpt is not None:
            line += f" ORCPT={self._value(recipient.orcpt)}"
        self._command(Verb.RCPT, line)

    def send_data(self) -> None:
        """DATA. Its 354 asks for `send_content` and `end_content`."""
        self._command(Verb.DATA, "DATA")

    def send_content(self, chunk: bytes) -> None:
        """Some of the content after 354, dots stuffed (RFC 5321 4.5.2).

        Raises:
            LocalProtocolError: no 354 was given.
        """
        if not self._is_open:
            raise LocalProtocolError("content without a 354")
        if chunk:
            self._out.append(self._stuffed(chunk))

    def end_content(self) -> None:
        """The final dot, on a line of its own.

        Raises:
            LocalProtocolError: no 354 was given.
        """
        if not self._is_open:
            raise LocalProtocolError("a final dot without a 354")
        if self._rest or self._lines:
            raise self._break("a reply that nobody had asked for")
        self._out.append(b".\r\n" if self._tail == b"\r\n" else b"\r\n.\r\n")
        self._is_open = False
        self._tail = b"\r\n"
        self.awaited.append(Verb.CONTENT)

    def send_last_chunk(self, *pieces: bytes) -> None:
        """BDAT LAST (RFC 3030 2): the whole message, octets as they are; it may travel in the group of its envelope.

        Raises:
            LocalProtocolError: CHUNKING is not offered, or it is not its time.
        """
        if not self.extensions.chunking:
            raise LocalProtocolError("BDAT without CHUNKING")
        content = b"".join(pieces)
        self._command(Verb.CONTENT, f"BDAT {len(content)} LAST", content)

    def begin_last_chunk(self, octets: int) -> None:
        """BDAT LAST for content that comes in pieces: `send_chunk_octets` must bring exactly `octets` of them.

        Raises:
            LocalProtocolError: something else is queued or unanswered.
        """
        if not self.extensions.chunking:
            raise LocalProtocolError("BDAT without CHUNKING")
        if not self.is_settled:
            raise LocalProtocolError("a chunk in pieces cannot wait for its turn")
        self._command(Verb.CONTENT, f"BDAT {octets} LAST")
        self._out.append(self.queued.pop()[1])
        self.awaited.append(Verb.CONTENT)
        self._chunk_left = octets

    def send_chunk_octets(self, piece: bytes) -> None:
        """Some octets of the chunk that was begun.

        Raises:
            LocalProtocolError: more than it was said to have.
        """
        if len(piece) > self._chunk_left:
            raise LocalProtocolError("more octets than the chunk has")
        self._chunk_left -= len(piece)
        self._out.append(piece)

    def send_reset(self) -> None:
        """RSET."""
        self._command(Verb.RSET, "RSET")

    def send_quit(self) -> None:
        """QUIT."""
        self._command(Verb.QUIT, "QUIT")

    # The one writer ---------------------------------------------------------------------------------------

    def _command(self, verb: Verb, line: str, content: bytes = b"") -> None:
        """Queue one command line, with the content that goes with it.

        Raises:
            LocalProtocolError: the line holds what must never be in one, or it is not its time.
        """
        if _CONTROLS.search(line) is not None:
            raise LocalProtocolError("control character in a command")
        if not line.isascii() and not (self._utf8 and verb in (Verb.MAIL, Verb.RCPT)):
            raise LocalProtocolError("non-ASCII text in a command without SMTPUTF8")
        if self.fault is not None:
            raise self.fault
        if self._is_open or self._tls_is_due or self._chunk_left:
            raise LocalProtocolError(f"{verb} is out of order")
        if (self._rest or self._lines) and not self.awaited and not self.queued:
            # Sending now would let a late reply answer this command.
            raise self._break("a reply that nobody had asked for")
        self.queued.append((verb, f"{line}\r\n".encode() + content))

    @staticmethod
    def _value(text: str) -> str:
        if _PARAMETER_VALUE.fullmatch(text) is None:
            raise LocalProtocolError("unsafe argument in a command")
        return text

    def _stuffed(self, chunk: bytes) -> bytes:
        """`chunk` with a dot before each dot that begins a line, also where the line end came with an earlier chunk."""
        stuffed = chunk.replace(b"\r\n.", b"\r\n..")
        if self._tail == b"\r\n":
            if chunk[0] == 0x2E:
                stuffed = b"." + stuffed
        elif self._tail[-1:] == b"\r" and chunk.startswith(b"\n."):
            stuffed = b"\n." + stuffed[1:]
        self._tail = chunk[-2:] if len(chunk) > 1 else self._tail[-1:] + chunk
        return stuffed


def challenge_of(reply: Reply) -> bytes:
    """The octets of a 334 challenge.

    Raises:
        RemoteProtocolError: they are not base64.
    """
    try:
        return base64.b64decode(reply.lines[0], validate=True)
    except (binascii.Error, ValueError):
        raise RemoteProtocolError("challenge is not base64", replies.UPSTREAM_PROTOCOL) from None


@lru_cache(maxsize=256)
def _read_reply(line: bytes) -> Reply:
    """The reply of a single short line. The few that come again and again are made once; replies are immutable."""
    return _make_reply((line,))


def _make_reply(lines: Sequence[bytes]) -> Reply:
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
