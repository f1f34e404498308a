"""The driver's interface to a server session: takes octets and decisions, and runs the input in order."""

import base64
import re
from collections.abc import Sequence
from typing import Final

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import DATA_LINES, Verb, common_mail, common_recipient
from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.handler import Asked
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.sequence import Phase
from otel_smtp.smtp.server.dispatching import Dispatching, is_http_request_line
from otel_smtp.smtp.server.replying import NOTHING_RECEIVED
from otel_smtp.smtp.server.securing import decoded_response
from otel_smtp.smtp.states import (
    TLS_OFFERS,
    CloseReason,
    ConnectionOver,
    ConnState,
    TlsMode,
)

# A line this many times over its limit is not read off any further: 421. In other servers unlimited discarding held
# sessions open until 2026.
_DISCARD_FACTOR: Final = 32
_HTTP_REQUEST: Final = re.compile(rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|PRI) ", re.IGNORECASE)
# The record header of a TLS handshake: type 22, version 3.x (RFC 8446 5.1).
_TLS_HANDSHAKE: Final = b"\x16\x03"
_NO_INPUT: Final = frozenset({Phase.HANDSHAKE, Phase.UNGREETED, Phase.ENDING})
_AUTHENTICATING: Final = Phase.AUTHENTICATING
_CONNECTED: Final = Phase.CONNECTED
_CONTENT: Final = Phase.CONTENT
_CONTENT_ASKED: Final = Asked.CONTENT
_ENDING: Final = Phase.ENDING
_MAIL: Final = Phase.MAIL
_NOTHING: Final = Asked.NOTHING
_READY: Final = Phase.READY
_RECIPIENTS: Final = Phase.RECIPIENTS
_RECIPIENTS_ASKED: Final = Asked.RECIPIENTS
_UNGREETED: Final = Phase.UNGREETED


class ServerProtocol(Dispatching):
    """One server session over one connection, TLS included.

    Args:
        policy: how the listener speaks.
        handler: decides.
        offer: returns the content and envelope extensions that can be promised now; called at each EHLO and MAIL, and
            cheapest if it returns the same object while nothing has changed. Its `starttls` and `auth_mechanisms` are
            ignored: those are the engine's own.
        recorded: takes each transition; see `StateMachine`.
        said: takes each reply before it becomes visible in `data_to_send`.
        on_illegal: see `StateMachine`.

    Attributes:
        phase: of the session.
        level, last, now_ns, recorded: see `StateMachine`. The driver sets `now_ns` before it calls.
        said: see above; may be replaced at any time.
        is_tls, is_authenticated: whether TLS is on; whether AUTH has succeeded.
        messages: how many got their final reply on this connection. `transactions`: how many began on it.
        errors: replies of 400 and above, plus a failed handshake.
        close_reason: why the session ends; None while it is open.
        asked: the question that the handler has not answered yet; nothing runs until it does.
        received: octets that have not run yet.
        out: replies that `data_to_send` has not taken.
        has_news: something other than the common course of a whole mail has happened: an error, an end, held octets.
            The driver resets it, and may set it.
        wants_turn: commands are left to run, but other connections come first: call `run` soon.

    Holds at most one line (12 KiB), the octets of one `receive_data` call, and one header block (256 KiB).
    """

    __slots__ = ()

    # Reports from the driver -----------------------------------------------------------------------------------

    def accepted(self, tls_mode: TlsMode) -> None:
        """Record New: the socket has been accepted."""
        self.enter(ConnState.NEW, TLS_OFFERS[tls_mode])

    def greet(self) -> None:
        """Open the session with 220; a client that spoke first is refused (RFC 5321 4.3.1: the sender waits)."""
        if self.received.held and not self._is_mismatch():
            self._send(replies.EARLY_TALKER, None)
        if self.phase is not _ENDING:
            self.phase = _CONNECTED
            self.enter(ConnState.ACTIVE)
            self._say(self._policy.greeting)
            if self._eof:
                self.run()

    def receive_data(self, data: bytes) -> None:
        """Take octets from the peer and run them. A peer that speaks before the greeting is greeted now.

        Raises:
            LocalProtocolError: called after `receive_eof`.
        """
        phase = self.phase
        if self._is_behind or self.asked is not _NOTHING:
            if self._eof:
                raise LocalProtocolError("receive_data after receive_eof")
        # Nothing waits to run before it. Commands of common mail run here, exactly as in `run`.
        elif phase is _CONTENT:
            if self._chunk is None:
                self._take_content(data)
                if self.received.held:
                    self.run()
                return
        elif phase is _RECIPIENTS and data in DATA_LINES:
            self._run_data()
            return
        elif phase is _MAIL or phase is _RECIPIENTS:
            recipient = common_recipient(data)  # which uses no extension
            if recipient is not None:
                transaction, limits = self._transaction, self._policy.limits
                assert transaction is not None
                if transaction.recipients < limits.recipients and len(data) <= limits.command_line:
                    self._batch = batch = [recipient]
                    self.asked = _RECIPIENTS_ASKED
                    self._handler.recipients_requested(batch)
                    return
        elif phase is _READY:
            mail, policy = common_mail(data), self._policy
            is_allowed = not policy.tls_required or self.is_tls
            if mail is not None and is_allowed and len(data) <= policy.limits.command_line:
                self._run_mail(mail)
                return
        self._hold(data)
        if phase is _UNGREETED:
            self.greet()
        else:
            self.run()

    def receive_eof(self) -> None:
        """The peer will send no more. Commands already received are still answered."""
        self._eof = True
        self.run()

    def closed(self, reason: CloseReason) -> None:
        """Record Closed: the transport is gone. `reason` counts unless the session has already ended for another."""
        if self.level is not ConnState.CLOSED:
            self._end(reason)
            assert self.close_reason is not None
            self.enter(ConnState.CLOSED, ConnectionOver(self.close_reason, self.messages))

    def data_to_send(self) -> bytes:
        """Take the octets in `out`."""
        data, self.out = self.out, b""
        return data

    # Decisions from above ----------------------------------------------------------------------------------------

    def reply(self, *decided: Reply) -> None:
        """Answer the open question, and continue.

        Args:
            decided: one reply; for recipients one each, in order; for LMTP content one per accepted recipient (RFC 2033
                4.2).

        Raises:
            LocalProtocolError: no question is open, or the number of replies is wrong.
        """
        self.answer(decided)

    def answer(self, decided: Sequence[Reply]) -> None:
        """The same as `reply`, with the replies as one argument."""
        if self.phase is _ENDING:
            return  # the session was ended from outside before the decision
        asked, self.asked = self.asked, _NOTHING
        if asked is _RECIPIENTS_ASKED:
            self._answer_recipients(decided)
        elif asked is _CONTENT_ASKED:
            self._answer_content(decided)
        else:
            self._answer_seldom(asked, *decided)
        if self._is_behind and not self._is_running:
            self.run()

    def _answer_seldom(self, asked: Asked, reply: Reply) -> None:
        match asked:
            case Asked.MAIL:
                self._answer_mail(reply)
            case Asked.TLS:
                self._answer_starttls(reply)
            case Asked.AUTH:
                self._answer_auth(reply)
            case _:
                raise LocalProtocolError("a reply to nothing that was asked")

    def challenge(self, data: bytes) -> None:
        """Continue the AUTH exchange: 334 with `data`."""
        if self.phase is Phase.ENDING:
            return
        if self.asked is not Asked.AUTH:
            raise LocalProtocolError("challenge outside an AUTH exchange")
        self.asked = Asked.NOTHING
        self.phase = Phase.AUTHENTICATING
        self._send(replies.challenge(base64.b64encode(data).decode("ascii")), Verb.AUTH)
        self.run()

    # Reading -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the received input, as far as decisions and the budget of one turn allow. The driver calls it only after
        `wants_turn`.
        """
        self.has_news = True
        if self._is_running:
            return  # decided within the call that asked: the loop below continues
        self._is_running = True
        self.wants_turn = False
        left = self._policy.commands_per_turn
        try:
            while self.asked is _NOTHING:
                if self._advance():
                    left -= 1
                    if left <= 0 and (self.received.held or self._held is not None):
                        self.wants_turn = True
                        return
                elif self._batch:
                    self._ask_recipients()
                elif self._eof and self.phase not in _NO_INPUT:
                    self._end(CloseReason.CLIENT_DISCONNECT)
                else:
                    return
        finally:
            self._is_running = False
            if not self.received.held:
                self.received = NOTHING_RECEIVED
            self._is_behind = bool(self.received.held or self._held is not None or self._discarded or self._eof)

    def _advance(self) -> bool:
        """Use up some input; returns whether anything changed."""
        if self._held is not None:
            if self._batch:
                return False
            held, self._held = self._held, None
            self._run(held)
            return True
        phase = self.phase
        if phase is _CONTENT:
            return self._read_content()
        if phase in _NO_INPUT:
            return False
        return self._read_auth_line() if phase is _AUTHENTICATING else self._read_command()

    def _read_line(self, limit: int) -> bytes | None:
        """The next line, CRLF included, or None; a line that is too long is discarded and answered here."""
        if not self._discarded:
            length = self.received.find_line(limit)
            if length > 0:
                return self.received.take(length)
            if length == 0 or self._batch:
                return None  # a line that is too long is answered in its turn
            self._discard_limit = limit * _DISCARD_FACTOR
            is_auth = self.phase is _AUTHENTICATING or self.received.peek(5).upper() == b"AUTH "
            self._too_long = replies.AUTH_LINE_TOO_LONG if is_auth else replies.LINE_TOO_LONG
        discarded = self.received.discard_line()
        self._discarded += len(discarded)
        if self._discarded > self._discard_limit:
            self._send(replies.LINE_DISCARD_EXCEEDED, None)
        elif discarded.endswith(b"\r\n"):
            self._discarded = 0
            self._refuse_long_line(discarded)
        elif discarded.endswith(b"\n"):
            # The server that passed it on may have taken the rest for content: smuggling. None of it runs.
            self._send(replies.BARE_LINE_FEED, "other")
        return None

    def _refuse_long_line(self, tail: bytes) -> None:
        if self.phase is _CONNECTED and is_http_request_line(tail):
            self._end(CloseReason.PROTOCOL_MISMATCH)
        elif self.phase is Phase.AUTHENTICATING:
            self.phase = Phase.READY
            self._fail_auth(self._too_long)
        else:
            self._send(self._too_long, "other")

    def _read_command(self) -> bool:
        if not self.received.held:
            return False
        if self.phase is _CONNECTED and not self._discarded and self._is_mismatch():
            return True
        had = len(self.received)
        limits = self._policy.limits
        is_auth = self.received.peek(5).upper() == b"AUTH "
        line = self._read_line(limits.auth_line if is_auth else limits.command_line)
        if line is None:
            return self.phase is Phase.ENDING or len(self.received) != had
        self._run_line(line)
        return True

    def _is_mismatch(self) -> bool:
        """End the session if the client speaks TLS or HTTP instead of SMTP in the clear.

        A browser or a forged server-side request does so; its headers and body may hold SMTP commands.
        """
        if self.received.starts_with(_TLS_HANDSHAKE) or _HTTP_REQUEST.match(self.received.peek(8)):
            self._end(CloseReason.PROTOCOL_MISMATCH)
            return True
        return False

    def _read_auth_line(self) -> bool:
        had = len(self.received)
        line = self._read_line(self._policy.limits.auth_line) if had else None
        if line is None:
            return self.phase is not Phase.AUTHENTICATING or len(self.received) != had
        line = line[:-2]
        if line == b"*":
            # RFC 4954 4: the client cancels.
            self.phase = Phase.READY
            self._fail_auth(replies.AUTH_CANCELLED)
        elif (response := decoded_response(line)) is None:
            self.phase = Phase.READY
            self._fail_auth(replies.BAD_BASE64)
        else:
            self.asked = Asked.AUTH
            self._handler.auth_responded(response)
        return True
