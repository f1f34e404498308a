"""STARTTLS and AUTH of a server session (RFC 3207, RFC 4954)."""

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import (
    Auth,
    StartTls,
    Verb,
)
from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.handler import Asked
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.sasl import MECHANISMS, SaslError, decode_base64
from otel_smtp.smtp.sequence import Phase
from otel_smtp.smtp.server.replying import Replying
from otel_smtp.smtp.states import (
    TLS_OFFERS,
    AuthBegun,
    CloseReason,
    ConnState,
    ErrorReply,
    TlsAgreed,
    TlsMode,
)


class Securing(Replying):
    """A session that can be encrypted and authenticated."""

    __slots__ = ()

    def _run_starttls(self, command: StartTls) -> None:
        if self.is_tls:
            self._send(replies.TLS_ALREADY_ON, Verb.STARTTLS)
        elif self._policy.tls_mode is not TlsMode.STARTTLS:
            self._send(replies.NOT_IMPLEMENTED, Verb.STARTTLS)
        else:
            # Octets behind it are checked when it is answered: the last moment at which they can come.
            self.asked = Asked.TLS
            self._handler.tls_requested()

    def _answer_starttls(self, reply: Reply) -> None:
        if self.received.held:
            # Octets behind STARTTLS would be run inside TLS as if the client had sent them there (CVE-2011-0411).
            self.received.clear()
            self._send(replies.OCTETS_BEHIND_STARTTLS, Verb.STARTTLS)
        elif reply.code != 220:
            self._send(reply, Verb.STARTTLS)
        else:
            self.phase = Phase.HANDSHAKE
            self.enter(ConnState.STARTTLS, TLS_OFFERS[TlsMode.STARTTLS])
            self._send(reply, Verb.STARTTLS)

    def handshake_begins(self) -> None:
        """Record StartTLS for implicit TLS, before the handshake."""
        self.phase = Phase.HANDSHAKE
        self.enter(ConnState.STARTTLS, TLS_OFFERS[TlsMode.IMPLICIT])

    def tls_started(self, version: str, cipher: str) -> None:
        """The handshake is done: the session starts over, and nothing sent in the clear counts (RFC 3207 4.2)."""
        if self.phase is not Phase.HANDSHAKE:
            raise LocalProtocolError("tls_started without a handshake")
        self.received.clear()
        self.is_tls = True
        self.is_authenticated = False  # a man in the middle may have sent it
        self._told = None
        self.phase = Phase.CONNECTED if self._policy.tls_mode is TlsMode.STARTTLS else Phase.UNGREETED
        self.enter(ConnState.ACTIVE, TlsAgreed(version, cipher))

    def tls_failed(self) -> None:
        """The handshake failed; no reply is possible. The connection ends."""
        self.errors += 1
        self.enter(ConnState.ERROR, ErrorReply(None, None, ErrorType.TLS, None))
        self._end(CloseReason.TLS_FAILURE)

    def _run_auth(self, command: Auth) -> None:
        self._announce_auth(command.mechanism)
        policy = self._policy
        if self._misconduct is not None and self._misconduct.auth_failures >= policy.limits.auth_failures:
            self._send(replies.TOO_MANY_AUTH_FAILURES, Verb.AUTH)
        elif not policy.auth_mechanisms:
            self._fail_auth(replies.NOT_IMPLEMENTED)
        elif self.is_authenticated:
            self._fail_auth(replies.ALREADY_AUTHENTICATED)
        elif command.mechanism not in policy.auth_mechanisms:
            self._fail_auth(replies.UNKNOWN_MECHANISM)
        elif command.mechanism not in policy.mechanisms(is_tls=self.is_tls):
            self._fail_auth(replies.ENCRYPTION_REQUIRED)
        else:
            initial = command.initial_response
            # RFC 4954 4: "=" is an initial response of no octets.
            decoded = None if initial is None else b"" if initial == "=" else decoded_response(initial.encode())
            if initial is not None and decoded is None:
                self._fail_auth(replies.BAD_BASE64)
            else:
                self.phase = Phase.AUTHENTICATING
                self.asked = Asked.AUTH
                self._handler.auth_requested(command.mechanism, decoded)

    def _announce_auth(self, mechanism: str | None) -> None:
        """Record Auth before any check of the command, but not inside a transaction, where AUTH is out of order."""
        if self.phase in (Phase.CONNECTED, Phase.READY):
            self._auth_mechanism = mechanism if mechanism is not None and mechanism in MECHANISMS else "other"
            self.enter(ConnState.AUTH, AuthBegun(self._auth_mechanism))

    def _fail_auth(self, reply: Reply) -> None:
        self._send(reply, Verb.AUTH)
        if self.level is ConnState.AUTH:
            self.fall_back(ConnState.ACTIVE)

    def _answer_auth(self, reply: Reply) -> None:
        self.phase = Phase.READY
        if reply.code == 235:
            self.is_authenticated = True
            self.enter(ConnState.ACTIVE, AuthBegun(self._auth_mechanism))
            self._send(reply, Verb.AUTH)
        else:
            if reply.error_type is ErrorType.AUTH and reply.is_permanent:
                self._noted_misconduct().auth_failures += 1
            self._fail_auth(reply)


def decoded_response(text: bytes) -> bytes | None:
    """The decoded response of a client within AUTH; None if it is not base64."""
    try:
        return decode_base64(text)
    except SaslError:
        return None
