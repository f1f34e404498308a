"""The AUTH exchanges against real clients."""

import pytest
import scramp
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_smtp.server.exchanges import Accepted, Authenticator, Challenge, Exchange, Rejected, Step
from otel_smtp.server.users import ScramKeys, Users
from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.sasl import (
    MECHANISMS,
    OAUTH_REFUSED,
    build_login,
    build_plain,
    build_xoauth2,
)
from tests.support.bearer import oauthbearer
from tests.support.examples import scaled


def begun(users: Users, mechanism: str) -> Exchange:
    exchange = Authenticator(users).begin(mechanism)
    assert exchange.mechanism == mechanism
    assert mechanism in MECHANISMS
    return exchange


async def test_plain_with_and_without_an_initial_response(argon2_users: Users) -> None:
    message = build_plain("tim", "tanstaaf")
    assert await begun(argon2_users, "PLAIN").step(message) == Accepted("tim")
    exchange = begun(argon2_users, "PLAIN")
    assert await exchange.step(None) == Challenge(b"")
    assert await exchange.step(message) == Accepted("tim")


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0tim\0wrong",
        b"\0tom\0tanstaaf",
        b"admin\0tim\0tanstaaf",
        b"\0tim\0tanstaaf\0",
        b"\0tim\0",
        b"\xff",
        b"\0" * 10_000,
    ],
)
async def test_plain_refusals_are_all_alike(argon2_users: Users, scram_users: Users, message: bytes) -> None:
    assert await begun(argon2_users, "PLAIN").step(message) == Rejected()
    assert await begun(scram_users, "PLAIN").step(message) == Rejected()


async def test_login_with_and_without_an_initial_response(scram_users: Users) -> None:
    name, password = build_login("tim", "tanstaaf")
    exchange = begun(scram_users, "LOGIN")
    assert await exchange.step(None) == Challenge(b"Username:")
    assert await exchange.step(name) == Challenge(b"Password:")
    assert await exchange.step(password) == Accepted("tim")
    exchange = begun(scram_users, "LOGIN")
    assert await exchange.step(name) == Challenge(b"Password:")
    assert await exchange.step(b"wrong") == Rejected()


async def test_login_refuses_a_malformed_name_only_after_the_password(scram_users: Users) -> None:
    exchange = begun(scram_users, "LOGIN")
    assert await exchange.step(b"t\0im") == Challenge(b"Password:")
    assert await exchange.step(b"x") == Rejected()


async def scram_with(
    users: Users, name: str, password: str, *, initial: bool = True
) -> tuple[Step, scramp.ScramClient, Exchange]:
    client = scramp.ScramClient(["SCRAM-SHA-256"], name, password)
    exchange = begun(users, "SCRAM-SHA-256")
    if not initial:
        assert await exchange.step(None) == Challenge(b"")
    first = await exchange.step(client.get_client_first().encode())
    assert isinstance(first, Challenge)
    client.set_server_first(first.data.decode())
    return await exchange.step(client.get_client_final().encode()), client, exchange


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize(("name", "password"), [("tim", "tanstaaf"), ("a,b=c", "x")])
async def test_scram_proves_both_sides(scram_users: Users, name: str, password: str, initial: bool) -> None:
    assert scram_users.mechanisms[0] == "SCRAM-SHA-256"
    final, client, exchange = await scram_with(scram_users, name, password, initial=initial)
    assert isinstance(final, Challenge)
    client.set_server_final(final.data.decode())  # raises if the server does not know the keys
    assert await exchange.step(b"") == Accepted(name)


async def test_scram_refuses_a_wrong_password_and_a_stranger_alike(scram_users: Users) -> None:
    wrong, _, _ = await scram_with(scram_users, "tim", "wrong")
    stranger, _, _ = await scram_with(scram_users, "stranger", "tanstaaf")
    assert wrong == stranger == Rejected()


async def test_scram_ends_with_an_empty_response(scram_users: Users) -> None:
    _, _, exchange = await scram_with(scram_users, "tim", "tanstaaf")
    assert await exchange.step(b"x") == Rejected()


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"n,,",
        b"n,,n=tim",
        b"n,,n=tim,r=",
        b"n,,n=,r=abc",
        b"n,,n=t\0im,r=abc",
        b"n,,n=t\nim,r=abc",
        b"n,a=admin,n=tim,r=abc",
        b"p=tls-unique,,n=tim,r=abc",
        b"n,,n=t=im,r=abc",
        b"n,,m=x,n=tim,r=abc",
        b"\xff",
        b"n,,n=" + b"n" * 300 + b",r=abc",
        b"n,,n=tim,r=" + b"\xc3\xbc",
        b"," * 9000,
    ],
)
async def test_malformed_scram_is_refused(scram_users: Users, message: bytes) -> None:
    assert await begun(scram_users, "SCRAM-SHA-256").step(message) == Rejected()


@settings(max_examples=scaled(200))
@given(
    st.one_of(st.binary(max_size=80), st.text(max_size=40).map(lambda text: f"n,,n={text},r=abc".encode())),
    st.one_of(st.binary(max_size=80), st.sampled_from([b"c=biws,r=abc,p=AAAA", b"c=!,r=x,p=y", b"c=biws,p=AA==,r=x"])),
)
async def test_no_messages_get_in_by_chance(first: bytes, second: bytes) -> None:
    users = Users({"tim": ScramKeys(4096, bytes(16), bytes(32), bytes(32))})
    exchange = begun(users, "SCRAM-SHA-256")
    if isinstance(await exchange.step(first), Challenge):
        assert await exchange.step(second) == Rejected()


async def verify_token(name: str, token: str) -> str | None:
    if token == "raise":
        raise OSError("the issuer cannot be reached")
    return f"{name or 'from-token'}" if token == "good" else None


async def test_tokens_are_verified_by_the_callable() -> None:
    authenticator = Authenticator(token_verifier=verify_token)
    assert authenticator.mechanisms == ("OAUTHBEARER", "XOAUTH2")
    assert await authenticator.begin("XOAUTH2").step(build_xoauth2("tim", "good")) == Accepted("tim")
    message = oauthbearer("tim", "good")
    assert await authenticator.begin("OAUTHBEARER").step(message) == Accepted("tim")
    exchange = authenticator.begin("OAUTHBEARER")
    assert await exchange.step(None) == Challenge(b"")
    assert await exchange.step(b"n,,\x01auth=Bearer good\x01\x01") == Accepted("from-token")


async def test_a_refused_token_is_told_why_and_then_refused() -> None:
    exchange = Authenticator(token_verifier=verify_token).begin("XOAUTH2")
    assert await exchange.step(build_xoauth2("tim", "bad")) == Challenge(OAUTH_REFUSED)
    assert await exchange.step(build_xoauth2("tim", "good")) == Rejected()
    assert await Authenticator(token_verifier=verify_token).begin("XOAUTH2").step(b"x") == Rejected()


async def test_a_verifier_that_fails_is_not_a_refusal() -> None:
    # Nothing is known of the token: the client is to try again later.
    with pytest.raises(OSError):
        await Authenticator(token_verifier=verify_token).begin("XOAUTH2").step(build_xoauth2("tim", "raise"))


def test_only_what_is_announced_can_be_begun(argon2_users: Users, scram_users: Users) -> None:
    for authenticator in (
        Authenticator(),
        Authenticator(argon2_users),
        Authenticator(scram_users, token_verifier=verify_token),
    ):
        for mechanism in (*MECHANISMS, "EXTERNAL", ""):
            if mechanism in authenticator.mechanisms:
                assert authenticator.begin(mechanism).mechanism == mechanism
            elif mechanism != "SCRAM-SHA-256" or authenticator.mechanisms == ():
                with pytest.raises(LocalProtocolError):
                    authenticator.begin(mechanism)
    assert Authenticator(scram_users, token_verifier=verify_token).mechanisms == (
        "SCRAM-SHA-256",
        "PLAIN",
        "LOGIN",
        "OAUTHBEARER",
        "XOAUTH2",
    )
