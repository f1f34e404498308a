"""Our output to an upstream: commands, and content in wire form. One writer makes every line."""

import base64
import re
from collections import deque
from collections.abc import Collection, Sequence
from typing import Final

from otel_smtp.smtp import replies
from otel_smtp.smtp.client.answers import (
    CONTENT,
    MAIL,
    MAX_REPLY_LINE_OCTETS,
    MAX_REPLY_LINES,
    MOST_KNOWN_OCTETS,
    RCPT,
    RSET,
    Awaited,
)
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.errors import LocalProtocolError, RemoteProtocolError
from otel_smtp.smtp.extensions import BEYOND_SIZE, NONE, OF_MAIL, OF_RECIPIENT, Extension, Parameter
from otel_smtp.smtp.replies import Reply

# RFC 2920 3.1: "can only appear as the last command in a group, since their success or failure produces a change of
# state which the client SMTP must accommodate". The last chunk ends a group because no command may be sent before its
# reply.
_ENDS_GROUP: Final = frozenset(
    {Awaited.GREETING, Awaited.EHLO, Awaited.STARTTLS, Awaited.AUTH, Awaited.DATA, Awaited.CONTENT, Awaited.QUIT}
)
# Whatever any server takes for a line end, and lone surrogates, which have no encoding.
_CONTROL: Final = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_CONTROLS: Final = re.compile(f"[{_CONTROL}]")
# A path whose end no reader can misplace: blanks and angle brackets only within the quotes of the local part (RFC 5321
# 4.1.2), and no line end anywhere. Each alternative can match in one way only, so the time is linear.
_QUOTED: Final = rf'"[^"\\{_CONTROL}]*(?:\\[ -~][^"\\{_CONTROL}]*)*"'
_BARE: Final = rf'[^\s<>"{_CONTROL}]'
_ORDINARY: Final = r"[!#-;=?-~]"  # `_BARE` within ASCII: matches almost all addresses, faster
_PATH: Final = re.compile(rf"{_ORDINARY}*|{_QUOTED}(?:@{_BARE}+)?|{_BARE}*")
_VALUE: Final = re.compile(r"[^\s\x00-\x20\x7f]+")
_CONTENT: Final = (CONTENT,)
_FOR_ONE: Final = (MAIL, RCPT)
_OF_MAIL: Final = tuple(of for of in OF_MAIL if of[1].field != "size")  # SIZE comes from the content


is_safe_path: Final = _PATH.fullmatch
"""Whether an address is unambiguous between the angle brackets of MAIL and RCPT: its match, or None."""


class Commanding:
    """The outgoing side of a connection to an upstream; see `ClientProtocol` for its arguments and attributes."""

    __slots__ = (
        "_accepted",
        "_chunk_left",
        "_content_left",
        "_disabled",
        "_is_clear",
        "_is_closing",
        "_is_open",
        "_lines",
        "_max_line_octets",
        "_max_lines",
        "_most_known_octets",
        "_out",
        "_rest",
        "_tail",
        "_tls_is_due",
        "_utf8",
        "awaited",
        "extensions",
        "fault",
        "is_in_step",
        "is_lmtp",
        "queued",
    )

    def __init__(
        self,
        *,
        is_lmtp: bool = False,
        max_reply_line_octets: int = MAX_REPLY_LINE_OCTETS,
        max_reply_lines: int = MAX_REPLY_LINES,
        disabled: Collection[str] = (),
    ) -> None:
        self.extensions = NONE
        self._disabled = disabled
        self.is_lmtp = is_lmtp
        self._max_line_octets = max_reply_line_octets
        self._max_lines = max_reply_lines
        # Of a read whose answers may be cached whole; none with LMTP, whose content has several replies.
        self._most_known_octets = -1 if is_lmtp else min(MOST_KNOWN_OCTETS, max_reply_line_octets)
        self._rest = b""  # received and not yet read: the beginning of a line, or unsolicited octets
        self._lines: list[bytes] = []  # lines of the reply that is arriving
        self.queued: deque[tuple[Sequence[Awaited], Sequence[bytes]]] = deque()
        self._out: list[bytes] = []
        self.awaited: deque[Awaited] = deque((Awaited.GREETING,))
        self._accepted = 0  # recipients of the transaction
        self._chunk_left = 0  # octets still to send of a chunk in pieces
        self._content_left = 0  # LMTP: replies to the content still to come
        self._is_open = False  # 354 was given and the content is not ended
        self._tail = b"\r\n"  # the last two octets of the content: whether the next one begins a line
        self._tls_is_due = False  # 220 to STARTTLS was given: only tls_started may follow
        self._utf8 = False  # MAIL had SMTPUTF8
        self._is_closing = False
        # Nothing received so far affects the next read: no partial reply, no open content, no farewell, no fault.
        # Recomputed after each read, and cleared by whatever ends it in between.
        self._is_clear = False
        self.fault: RemoteProtocolError | None = None
        self.is_in_step = False

    def __repr__(self) -> str:
        waits = " ".join(self.awaited) or "nothing"
        queued = " ".join(verb for verbs, _ in self.queued for verb in verbs) or "nothing"
        return f"<ClientProtocol waits for {waits}, {queued} queued{', broken' if self.fault else ''}>"

    # Questions ----------------------------------------------------------------------------------

    @property
    def is_closing(self) -> bool:
        """The upstream said 421: it is closing the connection (RFC 5321 3.8)."""
        return self._is_closing

    @property
    def is_settled(self) -> bool:
        """Every command that was queued has its answer."""
        return not self.awaited and not self.queued

    @property
    def accepted_recipients(self) -> int:
        """Recipients of the open transaction that got a 2yz."""
        return self._accepted

    def _break(self, what: str, said: Reply | None = None) -> RemoteProtocolError:
        """Note how the upstream broke the protocol; send and keep nothing more."""
        self.fault = RemoteProtocolError(what, replies.UPSTREAM_PROTOCOL, said)
        self.is_in_step = self._is_clear = False
        self.queued.clear()
        self._out.clear()
        return self.fault

    # Output -----------------------------------------------------------------------------------------------

    def data_to_send(self) -> bytes:
        """Octets to send now; b"" if earlier commands must be answered first. Each octet is returned once."""
        queued, awaited, out = self.queued, self.awaited, self._out
        while queued:
            if awaited and (not self.extensions.pipelining or awaited[-1] in _ENDS_GROUP):
                break
            verbs, pieces = queued.popleft()
            awaited += verbs
            if not (queued or out):
                return b"".join(pieces)
            out += pieces
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return data

    def cancel_queued(self) -> int:
        """Take back unsent commands; returns how many there were."""
        count = sum(len(verbs) for verbs, _ in self.queued)
        self.queued.clear()
        self.is_in_step = self._is_clear and not self.awaited
        return count

    def send_hello(self, name: str) -> None:
        """EHLO, or LHLO to an LMTP server; forgets the upstream's earlier offer."""
        self._hello("LHLO" if self.is_lmtp else "EHLO", name)

    def send_helo(self, name: str) -> None:
        """HELO, for a server that refused EHLO (RFC 5321 3.2)."""
        self._hello("HELO", name)

    def _hello(self, verb: str, name: str) -> None:
        self.extensions = NONE
        self._command(Awaited.EHLO, f"{verb} {self._value(name)}")

    def send_starttls(self) -> None:
        """STARTTLS. After its 220 only `tls_started` may follow."""
        self._command(Awaited.STARTTLS, "STARTTLS")

    def tls_started(self) -> None:
        """The handshake is done. Forgets everything that the upstream said in the clear (RFC 3207 4.2): send EHLO
        again.

        Raises:
            RemoteProtocolError: the upstream sent octets between its 220 and TLS.
            LocalProtocolError: no 220 was given.
        """
        if self.fault is not None:
            raise self.fault
        if not self._tls_is_due:
            raise LocalProtocolError("TLS was not agreed on")
        self._tls_is_due = False
        self.extensions = NONE

    def send_auth(self, mechanism: str, initial_response: bytes | None = None) -> None:
        """AUTH (RFC 4954 4). An answer with code 334 is a challenge: see `challenge_of` and `send_auth_response`."""
        line = f"AUTH {self._value(mechanism)}"
        if initial_response is not None:
            line += f" {base64.b64encode(initial_response).decode('ascii') or '='}"
        self._command(Awaited.AUTH, line)

    def send_auth_response(self, response: bytes) -> None:
        """The answer to a challenge."""
        self._command(Awaited.AUTH, base64.b64encode(response).decode("ascii"))

    def send_envelope(
        self, mail: Mail | None, recipients: Sequence[Recipient] = (), *, size: int | None = None
    ) -> None:
        """MAIL, and RCPT for each recipient, with the parameters that the upstream supports.

        Args:
            mail: None if MAIL has been sent already.
            size: octets of the content, if known better than from the client's SIZE.

        Raises:
            LocalProtocolError: an address or parameter that no command may have, or the command is out of order.
        """
        # Writes and checks each line itself, as `_command` would cost two more calls per mail. A safe path in ASCII has
        # no control characters, nor has a parameter.
        if not self.is_in_step or self._tls_is_due:
            self._check_turn(RCPT if mail is None else MAIL)
        verbs: Sequence[Awaited]
        lines: list[str]
        if mail is None:
            verbs = (RCPT,) * len(recipients)
            lines = []
        else:
            verbs = _FOR_ONE if len(recipients) == 1 else (MAIL, *[RCPT] * len(recipients))
            reverse_path = mail.reverse_path
            if not is_safe_path(reverse_path):
                raise LocalProtocolError("unsafe path in a command")
            if size is None:
                size = mail.size
            parameters = "" if size is None or "SIZE" not in self.extensions.keywords else f" SIZE={size:d}"
            self._utf8 = False
            if mail[2:] != BEYOND_SIZE:
                self._utf8 = mail.smtputf8 and "SMTPUTF8" in self.extensions.keywords
                parameters += self._parameters(mail, _OF_MAIL)
            lines = [f"MAIL FROM:<{reverse_path}>{parameters}\r\n"]
        for recipient in recipients:
            address, notify, orcpt = recipient
            if not is_safe_path(address):
                raise LocalProtocolError("unsafe path in a command")
            if notify is None and orcpt is None:
                lines.append(f"RCPT TO:<{address}>\r\n")
            else:
                lines.append(f"RCPT TO:<{address}>{self._parameters(recipient, OF_RECIPIENT)}\r\n")
        group = "".join(lines)
        if not group.isascii():
            for verb, line in zip(verbs, lines, strict=True):
                self._check_text(verb, line[:-2])
        self.is_in_step = False
        if self.extensions.pipelining:
            self.queued.append((verbs, (group.encode(),)))
        else:
            for verb, line in zip(verbs, lines, strict=True):
                self.queued.append(((verb,), (line.encode(),)))

    def send_data(self) -> None:
        """DATA. Its 354 asks for `send_content` and `end_content`."""
        self._command(Awaited.DATA, "DATA")

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
        self.is_in_step = False
        self._out.append(b".\r\n" if self._tail == b"\r\n" else b"\r\n.\r\n")
        self._is_open = False
        self._tail = b"\r\n"
        self.awaited.append(CONTENT)

    def send_last_chunk(self, *pieces: bytes) -> None:
        """BDAT LAST (RFC 3030 2): the whole message, octets unchanged; it may be sent in the group of its envelope.

        Raises:
            LocalProtocolError: CHUNKING is not offered, or the command is out of order.
        """
        if not self.extensions.chunking:
            raise LocalProtocolError("BDAT without CHUNKING")
        if not self.is_in_step or self._tls_is_due:
            self._check_turn(CONTENT)
        self.is_in_step = False
        octets = sum(map(len, pieces))
        self.queued.append((_CONTENT, (b"BDAT %d LAST\r\n" % octets, *pieces)))

    def begin_last_chunk(self, octets: int) -> None:
        """BDAT LAST for content that comes in pieces: `send_chunk_octets` must bring exactly `octets` of them.

        Raises:
            LocalProtocolError: something else is queued or unanswered.
        """
        if not self.extensions.chunking:
            raise LocalProtocolError("BDAT without CHUNKING")
        if not self.is_settled:
            raise LocalProtocolError("a chunk in pieces cannot wait for its turn")
        self._command(CONTENT, f"BDAT {octets} LAST")
        self._out += self.queued.pop()[1]
        self.awaited.append(CONTENT)
        self._chunk_left = octets
        self._is_clear = False

    def send_chunk_octets(self, piece: bytes) -> None:
        """Send some octets of the open chunk.

        Raises:
            LocalProtocolError: more than were announced.
        """
        if len(piece) > self._chunk_left:
            raise LocalProtocolError("more octets than the chunk has")
        self._chunk_left -= len(piece)
        self._out.append(piece)

    def send_reset(self) -> None:
        """RSET."""
        self._command(RSET, "RSET")

    def send_quit(self) -> None:
        """QUIT."""
        self._command(Awaited.QUIT, "QUIT")

    # The one writer ---------------------------------------------------------------------------------------

    def _command(self, verb: Awaited, line: str) -> None:
        """Queue one command line.

        Raises:
            LocalProtocolError: it holds forbidden characters, or is out of order.
        """
        self._check_text(verb, line)
        self._check_turn(verb)
        self.is_in_step = False
        self.queued.append(((verb,), (f"{line}\r\n".encode(),)))

    def _check_text(self, verb: Awaited, line: str) -> None:
        """Refuse a command line with forbidden characters. Printable ASCII passes."""
        if _CONTROLS.search(line) is not None:
            raise LocalProtocolError("control character in a command")
        if not line.isascii() and not (self._utf8 and verb in (MAIL, RCPT)):
            raise LocalProtocolError("non-ASCII text in a command without SMTPUTF8")

    def _check_turn(self, verb: Awaited) -> None:
        """Refuse a command that is out of order. While the engine is in step, and TLS is not due, any command may be
        sent.
        """
        if self.fault is not None:
            raise self.fault
        if self._is_open or self._tls_is_due or self._chunk_left:
            raise LocalProtocolError(f"{verb} is out of order")
        if (self._rest or self._lines) and not self.awaited and not self.queued:
            # Sending now would let a late reply answer this command.
            raise self._break("a reply that nobody had asked for")

    def _parameters(self, given: Mail | Recipient, known: Sequence[tuple[Extension, Parameter, int]]) -> str:
        """The parameters that the upstream supports, each after a space."""
        offered = self.extensions.keywords
        line = ""
        for row, parameter, place in known:
            value = given[place]
            if value is None or value is False or row.keyword not in offered:
                continue
            text = parameter.keyword if value is True else f"{parameter.keyword}={parameter.write(value)}"
            if _VALUE.fullmatch(text) is None:
                raise LocalProtocolError("unsafe argument in a command")
            line += f" {text}"
        return line

    @staticmethod
    def _value(text: str) -> str:
        if _VALUE.fullmatch(text) is None:
            raise LocalProtocolError("unsafe argument in a command")
        return text

    def _stuffed(self, chunk: bytes) -> bytes:
        """`chunk` with a dot before each dot that begins a line, even if the line end came with an earlier chunk."""
        stuffed = chunk.replace(b"\r\n.", b"\r\n..")
        if self._tail == b"\r\n":
            if chunk[0] == 0x2E:
                stuffed = b"." + stuffed
        elif self._tail[-1:] == b"\r" and chunk.startswith(b"\n."):
            stuffed = b"\n." + stuffed[1:]
        self._tail = chunk[-2:] if len(chunk) > 1 else self._tail[-1:] + chunk
        return stuffed
