"""The AUTH exchanges: from the client's first response to the verification of its identity.

`users` knows the users, `smtp.sasl` the format of the messages. The refusal is the same for every reason, so it does
not reveal which names exist.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.sasl import (
    LOGIN_CHALLENGES,
    OAUTH_REFUSED,
    BearerToken,
    Password,
    SaslError,
    parse_login,
    parse_oauthbearer,
    parse_plain,
    parse_xoauth2,
    prepare_name,
)

if TYPE_CHECKING:
    from otel_smtp.server.users import Users

TOKEN_VERIFIER_SECONDS: Final = 10.0

TokenVerifier = Callable[[str, str], Awaitable[str | None]]
"""Takes the name that a client claims ("" for none) and its bearer token; returns the name that the token proves, or
None.
"""

Turn = Callable[[str], AbstractAsyncContextManager[None]]
"""Takes the name that a client claims; returns the context in which to verify it; see `guesses`."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """Ask the client for one more response (334)."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Accepted:
    """The client's identity is verified (235)."""

    user: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """The client's identity is not proven, or its messages were malformed (535); the same answer for every reason."""


Step = Challenge | Accepted | Rejected


class Exchange(Protocol):
    """One AUTH command, from its first response to its end.

    Attributes:
        mechanism: its name, one of `sasl.MECHANISMS`.
    """

    mechanism: str

    async def step(self, response: bytes | None) -> Step:
        """Take the client's next response, decoded.

        Args:
            response: None only at first, if AUTH came without an initial response.

        Raises:
            Exception: the check itself failed (no memory, a token verifier that raises or is late): the credentials are
                neither right nor wrong, so the client should retry later (454).
        """
        ...


class Authenticator:
    """Begins exchanges, which check users with the given verifiers.

    Args:
        users: for PLAIN, LOGIN and SCRAM-SHA-256; None: these are not offered.
        token_verifier: for XOAUTH2 and OAUTHBEARER; None: these are not offered.
    """

    def __init__(self, users: "Users | None" = None, *, token_verifier: TokenVerifier | None = None) -> None:
        self._users = users
        self._token_verifier = token_verifier

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """The mechanisms to announce, in order."""
        by_password = () if self._users is None else self._users.mechanisms
        by_token = () if self._token_verifier is None else ("OAUTHBEARER", "XOAUTH2")
        return by_password + by_token

    def begin(self, mechanism: str, turn: Turn | None = None) -> Exchange:
        """Begin an exchange.

        Args:
            turn: the client's turn to have its credentials verified; None: it need not wait.

        Raises:
            LocalProtocolError: the mechanism is not in `mechanisms`.
        """
        users, verifier = self._users, self._token_verifier
        turn = turn or _at_once
        if users is not None:
            match mechanism:
                case "PLAIN":
                    return _PlainExchange(users, turn)
                case "LOGIN":
                    return _LoginExchange(users, turn)
                case "SCRAM-SHA-256":
                    return _ScramExchange(users, turn)
        if verifier is not None:
            match mechanism:
                case "XOAUTH2":
                    return _TokenExchange(mechanism, parse_xoauth2, verifier, turn)
                case "OAUTHBEARER":
                    return _TokenExchange(mechanism, parse_oauthbearer, verifier, turn)
        raise LocalProtocolError(f"AUTH {mechanism!r} was not offered")


@asynccontextmanager
async def _at_once(name: str) -> AsyncIterator[None]:
    yield


async def _check(users: "Users", credentials: Password, turn: Turn) -> Step:
    async with turn(credentials.name):
        return Accepted(credentials.name) if await users.has(credentials) else Rejected()


class _PlainExchange:
    __slots__ = ("_turn", "_users")
    mechanism = "PLAIN"

    def __init__(self, users: "Users", turn: Turn) -> None:
        self._users = users
        self._turn = turn

    async def step(self, response: bytes | None) -> Step:
        if response is None:
            return Challenge(b"")
        try:
            credentials = parse_plain(response)
        except SaslError:
            return Rejected()
        return await _check(self._users, credentials, self._turn)


class _LoginExchange:
    __slots__ = ("_answers", "_turn", "_users")
    mechanism = "LOGIN"

    def __init__(self, users: "Users", turn: Turn) -> None:
        self._users = users
        self._turn = turn
        self._answers: list[bytes] = []

    async def step(self, response: bytes | None) -> Step:
        if response is not None:
            self._answers.append(response)
        if len(self._answers) < len(LOGIN_CHALLENGES):
            return Challenge(LOGIN_CHALLENGES[len(self._answers)])
        try:
            credentials = parse_login(*self._answers)
        except SaslError:
            return Rejected()
        return await _check(self._users, credentials, self._turn)


class _ScramExchange:
    """RFC 5802. Our proof of knowing the keys goes into a last challenge, to which the client's response is empty."""

    __slots__ = ("_is_proven", "_name", "_refusals", "_server", "_turn", "_users")
    mechanism = "SCRAM-SHA-256"

    def __init__(self, users: "Users", turn: Turn) -> None:
        self._users = users
        self._turn = turn
        self._name = ""
        self._is_proven = False
        # Late: it imports an ASN.1 library. A gateway with users has already imported it.
        from scramp import ScramException, ScramMechanism

        self._server = ScramMechanism(self.mechanism).make_server(self._keys)
        self._refusals = (ScramException, ValueError)

    async def step(self, response: bytes | None) -> Step:
        if response is None:
            return Challenge(b"")
        if self._is_proven:
            return Rejected() if response else Accepted(self._name)
        try:
            message = response.decode("utf-8")
            if not self._name:
                self._server.set_client_first(message)
                return Challenge(self._server.get_server_first().encode())
            async with self._turn(self._name):
                self._server.set_client_final(message)
                server_final = self._server.get_server_final().encode()
        except self._refusals:
            return Rejected()
        # No password fits the keys made for an unknown name; still, only users are accepted.
        self._is_proven = self._users.knows(self._name)
        return Challenge(server_final) if self._is_proven else Rejected()

    def _keys(self, name: str) -> tuple[bytes, bytes, bytes, int]:
        self._name = prepare_name(name)
        keys = self._users.scram_keys(self._name)
        return keys.salt, keys.stored_key, keys.server_key, keys.iterations


class _TokenExchange:
    __slots__ = ("_is_refused", "_parse", "_turn", "_verifier", "mechanism")

    def __init__(
        self, mechanism: str, parse: Callable[[bytes], BearerToken], verifier: TokenVerifier, turn: Turn
    ) -> None:
        self.mechanism = mechanism
        self._parse = parse
        self._verifier = verifier
        self._turn = turn
        self._is_refused = False

    async def step(self, response: bytes | None) -> Step:
        if self._is_refused:
            return Rejected()
        if response is None:
            return Challenge(b"")
        try:
            token = self._parse(response)
        except SaslError:
            return Rejected()
        async with self._turn(token.name), asyncio.timeout(TOKEN_VERIFIER_SECONDS):
            user = await self._verifier(token.name, token.token)
        if user is not None:
            return Accepted(user)
        self._is_refused = True
        return Challenge(OAUTH_REFUSED)
