"""The users file, and strangers."""

import asyncio
import base64
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from otel_smtp.server.errors import UsersFileError
from otel_smtp.server.users import HASHING_THREADS, Argon2Hash, ScramKeys, Users, load_users, users_line
from otel_smtp.smtp.sasl import (
    Password,
)
from tests.server.passwords import QUICK, quick_line, written


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

    def decoy(self) -> "CountedProof":
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
        other = proof.decoy()
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

    def decoy(self) -> "_SlowProof":
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
