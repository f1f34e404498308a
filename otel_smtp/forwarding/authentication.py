"""Authentication to an upstream: PLAIN, LOGIN, SCRAM-SHA-256, XOAUTH2.

A mechanism is an object that answers challenges. It knows nothing of SMTP, and the connection knows nothing of it.
"""

import asyncio
import base64
import re
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

from otel_smtp.forwarding.settings import Credentials
from otel_smtp.smtp import sasl
from otel_smtp.smtp.replies import Reply

T = TypeVar("T")

# The best first. PLAIN precedes LOGIN because it needs one round trip less; both go over verified TLS only.
PREFERENCE: Final = ("SCRAM-SHA-256", "PLAIN", "LOGIN")
MAX_ITERATIONS: Final = 1_000_000
"""The most PBKDF2 rounds that an upstream may demand: about a second of one core. RFC 7677 4 says at least 4096."""

_ITERATIONS: Final = re.compile(r"(?:^|,)i=([0-9]{1,9})(?:,|$)")


class ExchangeFailed(Exception):
    """The upstream's challenge cannot be answered, or the upstream failed to prove that it knows our password."""


class Mechanism(Protocol):
    """The client's side of one SASL exchange."""

    name: str

    async def initial_response(self) -> bytes | None:
        """The initial response of AUTH; None: a challenge comes first."""
        ...

    async def respond(self, challenge: bytes) -> bytes:
        """The answer to a challenge.

        Raises:
            ExchangeFailed: break the exchange off.
        """
        ...

    def check_success(self) -> None:
        """Check the upstream's 235.

        Raises:
            ExchangeFailed: it may not.
        """
        ...


def choose(wanted: str, offered: Sequence[str], credentials: Credentials) -> Mechanism | None:
    """Choose a mechanism; None if the upstream offers no acceptable one.

    Args:
        wanted: "auto", or a mechanism in lower case.
        offered: by the upstream's EHLO, in capitals.

    Raises:
        ExchangeFailed: the credentials cannot be sent by it.
    """
    if wanted != "auto":
        names: Sequence[str] = (wanted.upper(),)
    else:
        names = ("XOAUTH2",) if credentials.tokens is not None else PREFERENCE
    for name in names:
        if name in offered:
            return _mechanism(name, credentials)
    return None


def _built(build: Callable[[], T]) -> T:
    try:
        return build()
    except sasl.SaslError as error:
        raise ExchangeFailed(str(error)) from error


def _mechanism(name: str, credentials: Credentials) -> Mechanism:
    match name:
        case "SCRAM-SHA-256":
            return _Scram(credentials)
        case "PLAIN":
            return _Plain(credentials)
        case "LOGIN":
            return _Login(credentials)
        case "XOAUTH2":
            return _XOAuth2(credentials)
        case _:
            raise ValueError(f"unknown mechanism {name!r}")


# Long enough base64 or hexadecimal: a token, or a secret that the upstream has encoded in its own way.
_LONG_WORD: Final = re.compile(r"[A-Za-z0-9+/_=-]{16,}")
_NO_WORD: Final = re.compile(r"[0-9=]")


def without_secrets(reply: Reply, credentials: Credentials) -> Reply:
    """`reply` with our own credentials, plain or encoded, removed from its text, so that it may be shown.

    Servers repeat user names, and worse, in replies to AUTH; yet an operator needs their words in order to act.
    """
    name, password = credentials.username, credentials.password
    secrets = [name, password, f"\0{name}\0{password}"]
    secrets += [base64.b64encode(secret.encode()).decode() for secret in secrets]
    words = "|".join(re.escape(secret) for secret in sorted(filter(None, secrets), key=len, reverse=True))
    pattern = re.compile(words or "(?!)", re.IGNORECASE)
    return reply.with_text(*(_LONG_WORD.sub(_unless_word, pattern.sub("[...]", line)) for line in reply.lines))


def _unless_word(found: re.Match[str]) -> str:
    return "[...]" if _NO_WORD.search(found[0]) else found[0]


class _Plain:
    """RFC 4616."""

    name = "PLAIN"

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def initial_response(self) -> bytes | None:
        return _built(lambda: sasl.build_plain(self._credentials.username, self._credentials.password))

    async def respond(self, challenge: bytes) -> bytes:
        raise ExchangeFailed("a challenge after PLAIN")

    def check_success(self) -> None:
        pass


class _Login:
    """Never standardised: two prompts, whose text does not matter."""

    name = "LOGIN"

    def __init__(self, credentials: Credentials) -> None:
        self._answers = list(_built(lambda: sasl.build_login(credentials.username, credentials.password)))

    async def initial_response(self) -> bytes | None:
        return None

    async def respond(self, challenge: bytes) -> bytes:
        if not self._answers:
            raise ExchangeFailed("a third question of LOGIN")
        return self._answers.pop(0)

    def check_success(self) -> None:
        pass


class _Scram:
    """RFC 5802 and RFC 7677; the upstream proves that it knows the password too."""

    name = "SCRAM-SHA-256"

    def __init__(self, credentials: Credentials) -> None:
        from scramp import ScramClient, ScramException  # late: it brings ASN.1, and few upstreams ask for it

        self._faults = (ScramException, UnicodeDecodeError, ValueError)
        self._client = ScramClient([self.name], credentials.username, credentials.password)
        self._step = 0

    async def initial_response(self) -> bytes | None:
        first: str = self._client.get_client_first()
        return first.encode()

    async def respond(self, challenge: bytes) -> bytes:
        self._step += 1
        try:
            text = challenge.decode()
            if self._step == 1:
                rounds = _ITERATIONS.search(text)
                if rounds is None or int(rounds[1]) > MAX_ITERATIONS:
                    raise ExchangeFailed("iteration count missing or too high")
                return await asyncio.to_thread(self._client_final, text)  # milliseconds of hashing, by design
            if self._step == 2:
                self._client.set_server_final(text)
                return b""
        except self._faults as error:
            raise ExchangeFailed("SCRAM failed") from error
        raise ExchangeFailed("a challenge too many")

    def _client_final(self, server_first: str) -> bytes:
        self._client.set_server_first(server_first)
        final: str = self._client.get_client_final()
        return final.encode()

    def check_success(self) -> None:
        if self._step != 2:
            raise ExchangeFailed("the upstream did not prove that it knows the password")


class _XOAuth2:
    """The bearer token of large providers, as they document it."""

    name = "XOAUTH2"

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def initial_response(self) -> bytes | None:
        tokens = self._credentials.tokens
        if tokens is None:
            raise ExchangeFailed("XOAUTH2 without a source of tokens")
        try:
            token = await tokens.token()
        except OSError as error:
            raise ExchangeFailed("no token available") from error
        return _built(lambda: sasl.build_xoauth2(self._credentials.username, token))

    async def respond(self, challenge: bytes) -> bytes:
        # The token was refused; the challenge says why, and an empty answer brings the 535.
        if self._credentials.tokens is not None:
            self._credentials.tokens.invalidate()
        return b""

    def check_success(self) -> None:
        pass
