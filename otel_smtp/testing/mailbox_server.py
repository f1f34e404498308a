"""The SMTP server in front of the mailbox, as far as a gateway on the same machine needs one.

It shares nothing with the gateway's own engine, so the mailbox holds what an independent server would have understood.
"""

import asyncio
from typing import Final

from otel_smtp.testing.mailbox import Mailbox, ReceivedMail

_KEYWORDS: Final = ("PIPELINING", "SIZE 104857600", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "DSN")
_END_OF_DATA: Final = b"\r\n.\r\n"


class MailboxServer(asyncio.Protocol):
    """One connection."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._searched = 0  # the end of data cannot begin before this
        self._is_content = False
        self._is_waiting = False
        self._sender: str | None = None
        self._recipients: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._say("220 mailbox.test ESMTP")

    def data_received(self, data: bytes) -> None:
        """Answer complete commands and content."""
        self._received += data
        self._answer_all()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, so that no pending reply is written to it."""
        self._transport = None

    def _answer_all(self) -> None:
        while self._transport is not None and not self._is_waiting:
            if self._is_content:
                # The CRLF of the DATA command may be the first half of the end of data.
                end = self._received.find(_END_OF_DATA, self._searched)
                if end < 0:
                    self._searched = max(0, len(self._received) - len(_END_OF_DATA) + 1)
                    return
                content = bytes(self._received[2 : end + 2]).replace(b"\r\n.", b"\r\n").removeprefix(b".")
                del self._received[: end + len(_END_OF_DATA)]
                self._take(content)
            else:
                end = self._received.find(b"\r\n")
                if end < 0:
                    return
                line = bytes(self._received[:end])
                del self._received[: end + 2]
                self._answer(line)

    def _answer(self, line: bytes) -> None:
        match line[:4].upper():
            case b"EHLO":
                self._reset()
                self._say(*(f"250-{keyword}" for keyword in ("mailbox.test", *_KEYWORDS[:-1])), f"250 {_KEYWORDS[-1]}")
            case b"HELO":
                self._reset()
                self._say("250 mailbox.test")
            case b"MAIL" if self._sender is None and (path := _path(line)) is not None:
                self._sender = path
                self._say("250 2.1.0 Ok")
            case b"RCPT" if self._sender is not None and (path := _path(line)) is not None:
                self._answer_recipient(path)
            case b"DATA" if self._recipients:
                self._received[:0] = b"\r\n"
                self._searched = 0
                self._is_content = True
                self._say("354 Go ahead")
            case b"RSET":
                self._reset()
                self._say("250 2.0.0 Ok")
            case b"NOOP":
                self._say("250 2.0.0 Ok")
            case b"QUIT":
                self._say("221 2.0.0 Bye")
                self._close()
            case b"MAIL" | b"RCPT" | b"DATA":
                self._say("503 5.5.1 Bad sequence of commands")
            case _:
                self._say("502 5.5.1 Command not implemented")

    def _answer_recipient(self, recipient: str) -> None:
        refusal = self._mailbox.judge_recipient(recipient)
        if refusal is None:
            self._recipients.append(recipient)
        self._say(refusal or "250 2.1.5 Ok")

    def _take(self, content: bytes) -> None:
        assert self._sender is not None
        line, seconds = self._mailbox.take(ReceivedMail(self._sender, tuple(self._recipients), content))
        self._is_content = False
        self._reset()
        if not seconds:
            self._finish(line)
            return
        self._is_waiting = True
        asyncio.get_running_loop().call_later(seconds, self._finish_late, line)

    def _finish(self, line: str | None) -> None:
        if line is None:
            self._close()
        else:
            self._say(line)

    def _finish_late(self, line: str | None) -> None:
        self._is_waiting = False
        self._finish(line)
        self._answer_all()

    def _reset(self) -> None:
        self._sender = None
        self._recipients = []

    def _say(self, *lines: str) -> None:
        if self._transport is not None:
            self._transport.write("".join(f"{line}\r\n" for line in lines).encode("ascii"))

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None


def _path(line: bytes) -> str | None:
    """The path between the angle brackets of MAIL and RCPT; a quoted local part may hold angle brackets too."""
    start, end = line.find(b"<"), line.rfind(b">")
    return line[start + 1 : end].decode("utf-8", "replace") if 0 <= start < end else None
