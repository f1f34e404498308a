"""The users file, the AUTH exchanges against real clients, and strangers."""

import asyncio
import base64
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path

import argon2
import pytest
import scramp
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_smtp.server.users import (
    HASHING_THREADS,
    Accepted,
    Argon2Hash,
    Authenticator,
    Challenge,
    Exchange,
    Rejected,
    ScramKeys,
    Step,
    Users,
    UsersFileError,
    load_users,
    users_line,
)
from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.sasl import (
    MECHANISMS,
    OAUTH_REFUSED,
    Password,
    build_login,
    build_plain,
    build_xoauth2,
)
from tests.support.bearer import oauthbearer

# As weak as argon2 goes: what is tested is not its strength.
QUICK = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


def quick_line(name: str, password: str) -> str:
    return f"{name}:{QUICK.hash(password)}"


def written(directory: Path, *lines: str) -> Path:
    path = directory / "users"
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def argon2_users(tmp_path_factory: pytest.TempPathFactory) -> Users:
    lines = [quick_line("tim", "tanstaaf"), quick_line("jürgen", "päss wörd")]
    return load_users(written(tmp_path_factory.mktemp("users"), *lines))


@pytest.fixture(scope="module")
def scram_users(tmp_path_factory: pytest.TempPathFactory) -> Users:
    lines = [users_line("tim", "tanstaaf", scram=True), users_line("a,b=c", "x", scram=True)]
    return load_users(written(tmp_path_factory.mktemp("users"), *lines))


# The file --------------------------------------------------------------------------------------------------------


async def test_made_lines_are_read_back(tmp_path: Path) -> None:
    users = load_users(
        written(tmp_path, "# people", "", users_line("tim", "one"), "  ", users_line("tom", "two", scram=True) + "\r")
    )
    assert len(users) == 2
    assert users.mechanisms == ("PLAIN", "LOGIN")  # SCRAM would fail for the first
    assert await users.has(Password("tim", "one"))
    assert await users.has(Password("tom", "two"))
    assert not await users.has(Password("tim", "two"))
    assert not await users.has(Password("tom", "one"))


def test_a_made_line_holds_no_password_and_no_two_are_alike() -> None:
    for scram, start in ((False, "tim:$argon2id$v=19$m=19456,t=2,p=1$"), (True, "tim:SCRAM-SHA-256$15000:")):
        line = users_line("tim", "tanstaaf", scram=scram)
        assert line.startswith(start)
        assert "tanstaaf" not in line
        assert line != users_line("tim", "tanstaaf", scram=scram)


@pytest.mark.parametrize("name", ["", " tim", "tim ", "#tim", "t:im", "t\nim", "t\x00im", "t\u202eim", "n" * 256])
def test_a_name_that_cannot_stand_in_the_file_makes_no_line(name: str) -> None:
    with pytest.raises(ValueError):
        users_line(name, "x")


def test_a_password_that_cannot_be_sent_makes_no_line() -> None:
    for password in ("", "a\0b"):
        for scram in (False, True):
            with pytest.raises(ValueError):
                users_line("tim", password, scram=scram)
    with pytest.raises(ValueError):
        users_line("tim", "\u0007", scram=True)  # SASLprep forbids control characters


PHC = QUICK.hash("x", salt=b"sixteen octets, ")  # the same in every process: it is part of the names of tests
KEYS = base64.b64encode(bytes(32)).decode()
SALT = base64.b64encode(bytes(16)).decode()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("tim", "no colon"),
        (f":{PHC}", "not a user name"),
        (f" :{PHC}", "not a user name"),
        (f"t\x01im:{PHC}", "not a user name"),
        ("tim:", "not a hash"),
        ("tim:secret", "not a hash"),
        ("tim:$2b$12$abcdefghijklmnopqrstuv", "not a hash"),
        (f"tim:{PHC.replace('argon2id', 'argon2i')}", "not a hash"),
        (f"tim:{PHC[:40]}", "not a hash"),
        (f"tim: {PHC}", "not a hash"),
        (f"tim:{PHC.replace('t=1', 't=0')}", "argon2id parameters out of range"),
        (f"tim:{PHC.replace('p=1', 'p=2')}", "argon2id parameters out of range"),  # 8 KiB a lane are the least
        (f"tim:{PHC.replace('m=8', 'm=1048577')}", "argon2id parameters out of range"),
        (f"tim:{PHC} # a comment", "not a hash"),
        (f"tim:SCRAM-SHA-256$4095:{SALT}${KEYS}:{KEYS}", "out of range"),
        (f"tim:SCRAM-SHA-256$9999999:{SALT}${KEYS}:{KEYS}", "out of range"),
        (f"tim:SCRAM-SHA-256$4096:{SALT}${KEYS}:{SALT}", "out of range"),
        (f"tim:SCRAM-SHA-256$4096:{SALT}${SALT}:{KEYS}", "out of range"),
        (f"tim:SCRAM-SHA-256$4096:QUJD${KEYS}:{KEYS}", "out of range"),
        (f"tim:SCRAM-SHA-256$4096:{SALT}${KEYS}:{KEYS}=", "malformed SCRAM keys"),
        (f"tim:SCRAM-SHA-1$4096:{SALT}${KEYS}:{KEYS}", "not a hash"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = written(tmp_path, "# people", quick_line("tom", "x"), line)
    with pytest.raises(UsersFileError, match=problem) as caught:
        load_users(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert "secret" not in str(caught.value)
    assert "$argon2" not in str(caught.value)


def test_a_name_given_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsersFileError, match="line 2: a user of that name"):
        load_users(written(tmp_path, quick_line("ti\u0308m", "x"), quick_line("t\u00efm", "y")))  # one name, two forms


def test_octets_that_are_not_utf8_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_bytes(b"# ok\nt\xffm:x\n")
    with pytest.raises(UsersFileError, match="line 2: not UTF-8"):
        load_users(path)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsersFileError, match="cannot be read"):
        load_users(tmp_path / "none")
    with pytest.raises(UsersFileError, match="cannot be read"):
        load_users(tmp_path)


def test_a_file_that_all_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, quick_line("tim", "x"))
    with caplog.at_level(logging.WARNING):
        load_users(path)
        assert not caplog.records
        path.chmod(0o644)
        load_users(path)
    assert [record.message for record in caplog.records] == ["users file readable by every user"]


async def test_a_password_that_scram_forbids_is_wrong_and_no_error(scram_users: Users) -> None:
    assert not await scram_users.has(Password("tim", "\u0007"))


async def test_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    users = load_users(written(tmp_path))
    assert len(users) == 0
    assert users.mechanisms == ("PLAIN", "LOGIN")
    assert not await users.has(Password("tim", "x"))


async def test_one_accented_letter_is_one_however_it_is_typed(argon2_users: Users) -> None:
    assert await argon2_users.has(Password("jürgen", "päss wörd"))
    assert await argon2_users.has(Password("jürgen", "pa\u0308ss wo\u0308rd"))


# Strangers -------------------------------------------------------------------------------------------------------


@dataclass
class CountedProof:
    """A `Proof` that notes its checks, and those of the one made like it, in one list."""

    password: str | None
    cost: str
    checks: list[tuple[str, str, str]] = field(default_factory=list)

    def is_proven_by(self, password: str) -> bool:
        self.checks.append((self.cost, password, threading.current_thread().name))
        return password == self.password

    def like_this(self) -> "CountedProof":
        return CountedProof(None, self.cost, self.checks)


async def test_a_stranger_costs_what_most_users_cost() -> None:
    checks: list[tuple[str, str, str]] = []
    users = Users(
        {
            "old": CountedProof("x", "1", checks),
            "tim": CountedProof("x", "2", checks),
            "tom": CountedProof("x", "2", checks),
        }
    )
    assert not await users.has(Password("tim", "guess"))
    assert not await users.has(Password("stranger", "guess"))
    assert [check[:2] for check in checks] == [("2", "guess"), ("2", "guess")]


async def test_no_check_runs_on_the_event_loop() -> None:
    proof = CountedProof("x", "1")
    users = Users({"tim": proof})
    assert await users.has(Password("tim", "x"))
    assert proof.checks[0][2].startswith("otel-smtp-passwords")
    assert threading.current_thread().name != proof.checks[0][2]


async def test_what_was_right_before_is_known_and_what_is_wrong_is_checked_each_time() -> None:
    proof = CountedProof("x", "1")
    users = Users({"tim": proof})
    assert await users.has(Password("tim", "x"))
    assert await users.has(Password("tim", "x"))
    assert len(proof.checks) == 1
    for _ in range(3):
        assert not await users.has(Password("tim", "y"))
    assert not await users.has(Password("tom", "x"))  # another name, the same password
    assert len(proof.checks) == 5


def test_the_stand_in_for_a_stranger_is_a_real_hash() -> None:
    # A malformed one would fail at once and give the stranger away.
    for proof in (Argon2Hash(PHC), ScramKeys(4096, bytes(16), bytes(32), bytes(32))):
        other = proof.like_this()
        assert other != proof
        assert other.cost == proof.cost
        assert not other.is_proven_by("x")
        assert Argon2Hash(PHC).is_proven_by("x")


def test_a_stranger_is_shown_the_same_scram_keys_each_time(tmp_path: Path) -> None:
    path = written(tmp_path, users_line("tim", "x", scram=True))
    one, other = load_users(path), load_users(path)  # two worker processes, say
    assert one.scram_keys("stranger") == other.scram_keys("stranger")
    assert one.scram_keys("stranger").salt != one.scram_keys("nobody").salt
    assert one.scram_keys("stranger").cost == one.scram_keys("tim").cost
    assert one.scram_keys("tim") == other.scram_keys("tim")


def test_hashes_do_not_show(tmp_path: Path) -> None:
    keys = load_users(written(tmp_path, users_line("tim", "x", scram=True))).scram_keys("tim")
    assert repr(keys) == "ScramKeys(iterations=15000)"
    assert repr(Argon2Hash(PHC)) == "Argon2Hash()"


# The exchanges ---------------------------------------------------------------------------------------------------


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


@settings(max_examples=200)
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


async def test_replaced_users_count_from_the_next_exchange_on(argon2_users: Users, tmp_path: Path) -> None:
    authenticator = Authenticator(argon2_users)
    before = authenticator.begin("PLAIN")
    authenticator.replace_users(load_users(written(tmp_path, quick_line("tim", "new"))))
    assert await before.step(build_plain("tim", "tanstaaf")) == Accepted("tim")
    assert await authenticator.begin("PLAIN").step(build_plain("tim", "tanstaaf")) == Rejected()
    assert await authenticator.begin("PLAIN").step(build_plain("tim", "new")) == Accepted("tim")


class _SlowProof:
    """Notes how many passwords are hashed at once."""

    cost = "slow"

    def __init__(self) -> None:
        self.at_once = self.most = 0
        self._lock = threading.Lock()
        self._all_hash = threading.Barrier(HASHING_THREADS)

    def is_proven_by(self, password: str) -> bool:
        with self._lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        self._all_hash.wait(5)  # for the other threads: as many as there are hash now
        with self._lock:
            self.at_once -= 1
        return False

    def like_this(self) -> "_SlowProof":
        return self


async def test_no_more_passwords_are_hashed_at_once_than_allowed() -> None:
    proof = _SlowProof()
    users = Users({"app": proof})
    guesses = [users.has(Password("app", f"guess {number}")) for number in range(10 * HASHING_THREADS)]
    assert not any(await asyncio.gather(*guesses))
    assert proof.most == HASHING_THREADS


async def test_passwords_are_hashed_where_their_threads_may_not_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(increment: int) -> int:
        raise PermissionError

    monkeypatch.setattr("os.nice", refuse)
    users = Users({"tim": Argon2Hash(QUICK.hash("tanstaaf"))})
    assert await users.has(Password("tim", "tanstaaf"))
