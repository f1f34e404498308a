"""Our input from an upstream: replies, matched to the commands that they answer."""

from collections.abc import Mapping, Sequence
from typing import Final

from otel_smtp.smtp.client.answers import (
    CONTENT,
    DATA,
    MAIL,
    MOST_CACHED_OCTETS,
    MOST_KNOWN_ANSWERS,
    NO_ANSWERS,
    RCPT,
    REPLY_LINE,
    RSET,
    Answer,
    Awaited,
    ExchangeAnswers,
    answer_of,
    make_reply,
    read_answers,
    read_reply,
    without_end,
)
from otel_smtp.smtp.client.commanding import Commanding
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import Reply

# The classes of codes that make sense (RFC 5321 4.3.2): 4yz and 5yz always do.
_DONE: Final = frozenset({2, 4, 5})
_CLASSES: Final[Mapping[Awaited, frozenset[int]]] = {
    **dict.fromkeys(Awaited, _DONE),
    Awaited.DATA: frozenset({3, 4, 5}),
    Awaited.AUTH: frozenset({2, 3, 4, 5}),
}


class ClientProtocol(Commanding):
    """The client's side of one connection to an upstream.

    Args:
        is_lmtp: LHLO instead of EHLO, and a reply for each accepted recipient after the content (RFC 2033 4.2).
        max_reply_line_octets: longest reply line, its line end included.
        max_reply_lines: most lines of one reply.
        disabled: extensions, in capitals, to be ignored in the reply to EHLO.

    Attributes:
        extensions: those of the last EHLO; none before it, after HELO, and from the start of TLS to the next EHLO.
        fault: how the upstream broke the protocol, or None. Close the connection then.
        awaited: what the next replies will answer, in order; read-only.
        queued: commands that `data_to_send` has not returned yet, in order, grouped if always sent together; read-only.
        is_in_step: the connection can serve another transaction: every command is answered, and nothing more has
            arrived.

    Holds at most one reply within its bounds, and what was queued and not sent.
    """

    __slots__ = ()

    def receive(self, data: bytes) -> ExchangeAnswers:
        """Take octets from the upstream; returns the replies that are now complete, with what they answer.

        Never raises: a violation of the protocol sets `fault`, after the answers that came before it. Reading stops at
        the answer to the last command; the next call judges octets behind it, and until then `is_in_step` is false.
        Nothing is read behind a 421, or behind a refusal that comes before the content has ended.

        Args:
            data: as read from the network, any length; b"" only judges octets left over.

        Returns:
            An answer whose verb is None is an unsolicited 421.
        """
        awaited = self.awaited
        if self._is_clear and len(data) <= self._most_known_octets and len(awaited) <= MOST_KNOWN_ANSWERS:
            known = read_answers(data, (*awaited,))
            if known is not None:
                answers, begins_anew, accepted = known
                self._accepted = accepted if begins_anew else self._accepted + accepted
                awaited.clear()
                self.is_in_step = not self.queued
                return answers
        read = self._read(data)
        self._is_clear = not (
            self._rest or self._lines or self._is_open or self._chunk_left or self._is_closing or self.fault is not None
        )
        self.is_in_step = self._is_clear and not (awaited or self.queued)
        return ExchangeAnswers(read) if read else NO_ANSWERS

    def _read(self, data: bytes) -> list[Answer]:
        """Read `data` line by line; see `receive`."""
        answers: list[Answer] = []
        if self.fault is not None or self._is_closing:
            return answers
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if self._tls_is_due and data:
            # Injection before TLS: these octets were meant to be read as if they had come under TLS.
            self._break("octets behind the 220 of STARTTLS")
            return answers
        awaited, size = self.awaited, len(data)
        position = 0
        while True:
            end = data.find(b"\n", position) + 1
            octets = (end or size) - position
            if octets > self._max_line_octets:
                self._break("reply line too long")
                return answers
            if not end:
                break
            line = data[position:end]
            position = end
            lines: Sequence[bytes] = ()
            reply = None if octets > MOST_CACHED_OCTETS or self._lines else read_reply(line)
            if reply is None:
                taken = self._take_line(without_end(line))
                if taken is None:
                    return answers
                if not taken:
                    continue
                lines, reply = taken, make_reply(taken)
            code = reply.code
            if code == 421:
                self._is_closing = True
            if not awaited:
                self._take_unasked(reply, answers)
                return answers
            verb = awaited[0]
            # 4yz and 5yz can answer any command, 2yz any but DATA.
            if code < 400 and (code >= 300 or verb is DATA) and code // 100 not in _CLASSES[verb]:
                self._break(f"{verb} answered with {code}", reply)
                return answers
            awaited.popleft()
            if verb is RCPT:
                self._accepted += code < 400
            elif verb is MAIL or verb is RSET:
                self._accepted = 0
            elif verb is CONTENT:
                if position == size and not self.is_lmtp and not self._chunk_left:
                    self._accepted = 0  # a single reply after all of the content was sent: it counts
                elif not self._settle_content(reply, data[position : position + 3]):
                    return answers
            elif not self._settle(verb, reply, lines, has_surplus=position < size):
                return answers
            answers.append(answer_of((verb, reply)))
            if code == 421:
                return answers
            if not awaited:
                break
        if position < size:
            self._rest = data[position:]
        return answers

    def _take_line(self, line: bytes) -> Sequence[bytes] | None:
        """Take a line of a multi-line reply, or a long line.

        Returns:
            All lines of the reply once it is complete, no lines before; None: it is no reply line, and `fault` is set.
        """
        match = REPLY_LINE.fullmatch(line)
        lines = self._lines
        if match is None or (lines and lines[0][:3] != line[:3]):
            self._break("a line that is no reply")
            return None
        lines.append(line)
        if len(lines) > self._max_lines:
            self._break("reply of too many lines")
            return None
        if match[2] == b"-":
            return ()
        self._lines = []
        return lines

    def _take_unasked(self, reply: Reply, answers: list[Answer]) -> None:
        """Take an unsolicited reply: a farewell, or a refusal of the content before its end."""
        if reply.code >= 400 and self._is_open:
            self._is_closing = True  # before the end of the content there is no way back
            answers.append(Answer(Awaited.CONTENT, reply))
        elif reply.code == 421:
            answers.append(Answer(None, reply))
        else:
            self._break("a reply that nobody had asked for")

    def _settle(self, verb: Awaited, reply: Reply, lines: Sequence[bytes], *, has_surplus: bool) -> bool:
        """Apply `reply` to the state; returns whether it counts."""
        match verb:
            case Awaited.DATA:
                self._is_open = reply.code < 400
            case Awaited.EHLO if reply.is_positive:
                keywords = [line[4:].decode("ascii", "replace") for line in lines[1:]]
                self.extensions = Extensions.parse(keywords, disabled=self._disabled)
            case Awaited.STARTTLS:
                self._tls_is_due = reply.is_positive
                if self._tls_is_due and has_surplus:
                    self._break("octets behind the 220 of STARTTLS")
                    return False
            case _:
                pass
        return True

    def _settle_content(self, reply: Reply, surplus: bytes) -> bool:
        """Apply the reply to the content; returns whether it counts. `surplus`: the first octets behind it."""
        is_positive = reply.code < 400
        if self._chunk_left and is_positive:
            self._break("content accepted before its end")
            return False
        if self.is_lmtp:
            # RFC 2033 4.2: one reply "for each previously successful RCPT command"; BDAT LAST without any has one 503.
            if self._content_left == 0:
                self._content_left = max(1, self._accepted)
            self._content_left -= 1
            if self._content_left > 0 and reply.code != 421:
                self.awaited.appendleft(Awaited.CONTENT)
                return True
            self._content_left = 0
        self._accepted = 0
        # A surplus reply means that this one was perhaps not meant for the message, and doubt is never success. Only a
        # farewell, or the beginning of one, leaves no doubt.
        if is_positive and not b"421".startswith(surplus):
            self._break("more replies than commands")
            return False
        return True
