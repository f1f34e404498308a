"""Target: SASL on both sides. Octet 0 chooses the mechanism, the rest are messages, parted by 0xFF.

Claimed: the parsers raise only `SaslError`, and what they take is written back to what they take again; an exchange of
the server ends within few steps, raises nothing, and lets nobody in who proved nothing; the client's side raises only
`ExchangeFailed` and believes no upstream that proved nothing; no `repr` shows a secret.
"""

import asyncio
import base64
import re
from collections.abc import Callable
from functools import cache
from typing import Final, TypeVar

from otel_smtp.forwarding.authentication import ExchangeFailed, choose
from otel_smtp.forwarding.settings import Credentials
from otel_smtp.server.exchanges import Accepted, Authenticator, Challenge
from otel_smtp.server.users import ScramKeys, Users
from otel_smtp.smtp import sasl
from otel_smtp.smtp.sasl import BearerToken, Password, SaslError
from tests.support.bearer import oauthbearer

MAX_STEPS: Final = 5
T = TypeVar("T", Password, BearerToken)
_USER: Final = "user"
_TOKEN: Final = "token"
# PBKDF2 costs a millisecond for some thousand rounds; what is hashed is not what is tried here.
_COSTLY: Final = re.compile(rb"i=[0-9]{4,}")
_MECHANISMS: Final = ("PLAIN", "LOGIN", "SCRAM-SHA-256", "XOAUTH2", "OAUTHBEARER")


class _Proof:
    """A password, checked at no cost."""

    cost = "nothing"

    def is_proven_by(self, password: str) -> bool:
        return password == "secret"

    def decoy(self) -> "_Proof":
        return self


class _ScramProof(ScramKeys):
    """Keys that no password fits."""

    def is_proven_by(self, password: str) -> bool:
        return False


class _AtOnce(Users):
    """Checks passwords without a thread."""

    async def has(self, credentials: Password) -> bool:
        return credentials.name == _USER and _Proof().is_proven_by(credentials.password)


async def _verify(name: str, token: str) -> str | None:
    return _USER if token == _TOKEN and name in ("", _USER) else None


@cache
def _authenticator() -> Authenticator:
    keys = _ScramProof(4096, b"s" * 16, b"k" * 32, b"v" * 32)
    return Authenticator(_AtOnce({_USER: keys}), token_verifier=_verify)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def run(data: bytes) -> None:
    """Messages to the parsers, to an exchange of the server, and to one of the client."""
    if not data:
        return
    messages = data[1:].split(b"\xff")[:MAX_STEPS]
    _try_base64(data[1:])
    _try_parsers(messages)
    _loop().run_until_complete(_serve(_MECHANISMS[data[0] % 5], messages, starts_empty=bool(data[0] & 0x80)))
    if _COSTLY.search(data) is None:
        _loop().run_until_complete(_ask(_MECHANISMS[data[0] % 3], messages))


def _try_base64(text: bytes) -> None:
    try:
        octets = sasl.decode_base64(text)
    except SaslError:
        return
    assert base64.b64encode(octets) == text


def _try_parsers(messages: list[bytes]) -> None:
    message = messages[0]
    if (plain := _taken(sasl.parse_plain, message)) is not None:
        assert sasl.parse_plain(sasl.build_plain(plain.name, plain.password)) == plain
        assert repr(plain) == f"Password(name={plain.name!r})"
    if len(messages) > 1 and (login := _taken(lambda name: sasl.parse_login(name, messages[1]), message)) is not None:
        assert sasl.parse_login(*sasl.build_login(login.name, login.password)) == login
    if (token := _taken(sasl.parse_xoauth2, message)) is not None:
        assert sasl.parse_xoauth2(sasl.build_xoauth2(token.name, token.token)) == token
        assert repr(token) == f"BearerToken(name={token.name!r})"
    if (token := _taken(sasl.parse_oauthbearer, message)) is not None and token.name:
        built = oauthbearer(token.name, token.token)
        assert sasl.parse_oauthbearer(built) == token


def _taken(parse: Callable[[bytes], T], message: bytes) -> T | None:
    try:
        return parse(message)
    except SaslError:
        return None


async def _serve(mechanism: str, messages: list[bytes], *, starts_empty: bool) -> None:
    exchange = _authenticator().begin(mechanism)
    responses: list[bytes | None] = [None, *messages] if starts_empty else [*messages]
    for response in responses:
        step = await exchange.step(response)
        if isinstance(step, Challenge):
            continue
        if isinstance(step, Accepted):
            assert step.user == _USER
            assert mechanism != "SCRAM-SHA-256", "nobody has the keys"
            assert b"secret" in b"".join(messages) or b"token" in b"".join(messages)
        return
    assert len(responses) <= MAX_STEPS + 1


async def _ask(mechanism: str, challenges: list[bytes]) -> None:
    try:
        client = choose(mechanism.lower(), _MECHANISMS, Credentials(_USER, "secret"))
        assert client is not None
        await client.initial_response()
        for challenge in challenges:
            await client.respond(challenge)
        client.check_success()
    except ExchangeFailed:
        return
    assert mechanism != "SCRAM-SHA-256", "an upstream without the keys was believed"
