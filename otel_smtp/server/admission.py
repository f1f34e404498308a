"""The identity of a session's client: PROXY header, access, TLS, AUTH."""

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Final

from otel_smtp.net import owner_of_peer
from otel_smtp.net.reasons import reason_of
from otel_smtp.observing import Endpoint
from otel_smtp.server.conversation import Conversation, Login, Pause
from otel_smtp.server.exchanges import Accepted, Challenge
from otel_smtp.server.guesses import TooManyGuesses
from otel_smtp.server.policy import is_in, is_loopback
from otel_smtp.server.proxy_protocol import ProxyHeader, ProxyHeaderParser, ProxyProtocolError
from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.sequence import Phase
from otel_smtp.smtp.states import CloseReason, TlsMode

logger: Final = logging.getLogger("otel_smtp.server.session")

# A PROXY header comes at once from our own load balancer; Postfix allows the same five seconds.
PROXY_HEADER_SECONDS: Final = 5.0


class Admission(Conversation):
    """A session that establishes its client's identity and permissions."""

    __slots__ = ()

    # The beginning -----------------------------------------------------------------------------------------------

    def begin(self, refusal: Reply | None) -> None:
        """Start serving the connection.

        Args:
            refusal: the reply to send instead (capacity).
        """
        self._house.observer.connection_opened(self.record)
        policy = self._policy
        if policy.timeouts.session is not None:
            self._session_ends = self._began + policy.timeouts.session
        self._protocol.accepted(policy.protocol.tls_mode)
        if policy.protocol.tls_mode is TlsMode.IMPLICIT or is_in(policy.proxy_protocol_from, self._stream.peer.host):
            # The first octets belong to the TLS layer, or form a PROXY header, of which not one octet too many may be
            # read.
            self._stream.pause_reading()
            self._start(self._prepare, refusal)
        else:
            self._call(self._open, refusal)

    async def _prepare(self, refusal: Reply | None) -> None:
        """The steps before the session itself: PROXY header, implicit TLS."""
        policy = self._policy
        if is_in(policy.proxy_protocol_from, self._stream.peer.host):
            header = await self._read_proxy_header()
            if header is None:
                return
            if self._believe(header):
                refusal = refusal or self._house.admit(self, self.record.client)
        if policy.protocol.tls_mode is TlsMode.IMPLICIT:
            refusal = refusal or self._access_refusal()
            if refusal is not None:
                self._protocol.refuse(refusal)
                return
            self._protocol.handshake_begins()
            if not await self._shake_hands_at_once():
                return
        self._task = None
        self._open(refusal)  # written at the end of this task

    def _open(self, refusal: Reply | None) -> None:
        """Refuse or greet the connection: at once, or after reading what an early talker has already sent."""
        refusal = refusal or self._access_refusal()
        if refusal is not None:
            self._protocol.refuse(refusal)
            return
        self._is_served = True
        is_early = self._stream.has_input()
        self._stream.receive_by(self)
        self._stream.resume_reading()
        if not is_early:
            self._protocol.greet()

    async def _shake_hands_at_once(self) -> bool:
        """The handshake of implicit TLS. A client that leaves silently is a health check, not a failed handshake."""
        stream = self._stream
        stream.deadline = ends = self._loop.time() + self._policy.timeouts.tls_handshake
        try:
            has_spoken = await stream.wait_for_input()
        except TimeoutError as error:
            self._handshake_failed(error)
            return False
        finally:
            stream.deadline = None
        if not has_spoken:
            self._protocol.fail(None, CloseReason.CLIENT_DISCONNECT)
            return False
        return await self._shake_hands(ends - self._loop.time())

    async def _read_proxy_header(self) -> ProxyHeader | None:
        """Read the PROXY header that a listed network must send; None: the connection has ended."""
        stream = self._stream
        parser = ProxyHeaderParser()
        stream.deadline = self._loop.time() + PROXY_HEADER_SECONDS
        header: ProxyHeader | None = None
        try:
            while header is None:
                data = await stream.read_sparingly(parser.octets_wanted)
                if not data:
                    self._protocol.fail(None, CloseReason.CLIENT_DISCONNECT)
                    return None
                header = parser.feed(data)
        except (ProxyProtocolError, TimeoutError) as error:
            is_late = isinstance(error, TimeoutError)
            fault = f"no PROXY header within {PROXY_HEADER_SECONDS:g} s" if is_late else str(error)
            logger.warning("bad PROXY header", extra={**self._named(), "fault": fault})
            self._protocol.refuse(replies.BAD_PROXY_HEADER)
            return None
        finally:
            stream.deadline = None
        return header

    def _believe(self, header: ProxyHeader) -> bool:
        """Adopt the ends that the header names; returns whether they are plausible."""
        if header.source is None or header.destination is None or not self._may_be(header.source):
            return False
        self.record.proxied(header.source, header.destination)
        return True

    def _may_be(self, source: Endpoint) -> bool:
        """Whether the client can be `source`. A loopback address named by another machine is that machine's own: seen
        from here, its client is the peer. Trusting it would grant it the permissions of our own applications.
        """
        return not is_loopback(source.host) or is_loopback(self._stream.peer.host)

    def _access_refusal(self) -> Reply | None:
        if not self._house.may_authenticate(self.record.client):
            return replies.TOO_MANY_AUTH_FAILURES
        if self._is_allowed() or self._policy.protocol.auth_mechanisms:
            return None
        return replies.ACCESS_DENIED

    def _is_allowed(self) -> bool:
        """Whether this client may relay without AUTH."""
        if self._allows is None:
            record = self.record
            self._allows = record.transport == "unix" or is_in(self._policy.allow, record.client.host)
        return self._allows

    # TLS and AUTH ------------------------------------------------------------------------------------------------

    def hello_received(self, verb: str, name: str) -> None:
        """See `Handler`."""
        self.record.hello_verb = verb
        self.record.hello_name = name
        self._received_head = None

    def tls_requested(self) -> None:
        """See `Handler`."""
        # Reading stops before the 220 goes out: an early ClientHello must wait in the kernel for the TLS layer. The
        # engine already has, and refuses, octets sent in the clear behind STARTTLS.
        self._pause(Pause.TLS)
        self._stream.receive_by(None)
        self._loop.call_soon(self._upgrade)
        self._protocol.reply(replies.TLS_READY)

    def _upgrade(self) -> None:
        if self._protocol.phase is Phase.HANDSHAKE and not self._has_ended:
            self._start(self._upgraded)

    async def _upgraded(self) -> None:
        self._pauses = 0
        if await self._shake_hands(self._policy.timeouts.tls_handshake):
            self._began = self._loop.time()
            self._stream.receive_by(self)

    async def _shake_hands(self, timeout_seconds: float) -> bool:
        context = self._policy.tls_context
        assert context is not None
        try:
            tls = await self._stream.start_tls(
                context,
                server_side=True,
                timeout_seconds=timeout_seconds,
                from_first_octet=self._policy.protocol.tls_mode is TlsMode.IMPLICIT,
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            self._handshake_failed(error)
            return False
        record = self.record
        record.hello_verb = record.hello_name = ""
        record.tls = tls
        self._received_head = None
        self._protocol.now_ns = time.monotonic_ns()
        self._protocol.tls_started(tls.version, tls.cipher)
        return True

    def _handshake_failed(self, error: OSError | TimeoutError) -> None:
        seconds = self._policy.timeouts.tls_handshake
        is_late = isinstance(error, TimeoutError)
        self.record.failure = f"no TLS handshake within {seconds:g} s" if is_late else reason_of(error)
        logger.info("TLS handshake failed", extra={**self._named(), "fault": self.record.failure})
        self._protocol.now_ns = time.monotonic_ns()
        self._protocol.tls_failed()

    def auth_requested(self, mechanism: str, initial_response: bytes | None) -> None:
        """See `Handler`."""
        authenticator = self._policy.authenticator
        assert authenticator is not None
        self._auth = Login(authenticator.begin(mechanism, self._turn))
        self._start(self._authenticate, self._auth, initial_response)

    def auth_responded(self, response: bytes) -> None:
        """See `Handler`."""
        assert self._auth is not None
        self._start(self._authenticate, self._auth, response)

    @contextlib.asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        """The client's turn to have its claim to be `name` verified."""
        login = self._auth
        assert login is not None
        login.claimed = name
        login.awaits_turn = True
        try:
            async with self._house.guesses.turn(self._guesser(), name):
                login.awaits_turn = False
                yield
        finally:
            login.awaits_turn = False

    async def _authenticate(self, login: Login, response: bytes | None) -> None:
        record, protocol, exchange = self.record, self._protocol, login.exchange
        try:
            step = await exchange.step(response)
        except TooManyGuesses:
            self._auth = None
            self._call(self._protocol.reply, replies.TOO_MANY_AUTH_FAILURES)
            return
        except Exception:
            self._auth = None
            logger.exception("authentication not run: internal error", extra=self._named())
            self._call(self._protocol.reply, replies.AUTH_UNAVAILABLE)
            return
        if not isinstance(step, Challenge):
            self._auth = None  # an exchange may hold the client's credentials
        protocol.now_ns = time.monotonic_ns()
        match step:
            case Challenge(data):
                self._task = None
                self._call(protocol.challenge, data)
            case Accepted(user):
                self._house.guesses.succeeded(self._guesser(), login.claimed)
                record.user = user
                record.auth_mechanism = exchange.mechanism
                self._received_head = None
                self._call(self._protocol.reply, replies.AUTH_SUCCEEDED)
            case _:
                record.auth_mechanism = exchange.mechanism
                self._house.guesses.failed(self._guesser(), login.claimed)
                self._call(self._protocol.reply, replies.AUTH_FAILED)

    def _guesser(self) -> str:
        """The guesser's identity: on this machine the owner of the socket, since one owner may use any loopback
        address.
        """
        record = self.record
        is_tcp = record.transport != "unix"
        is_here = record.client == self._stream.peer and (not is_tcp or is_loopback(record.client.host))
        return (owner_of_peer(self._stream) if is_here else None) or record.client.host
