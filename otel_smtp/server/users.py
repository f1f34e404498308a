"""The users file: users that may authenticate.

The users file is UTF-8 text, one user per line, ``NAME:HASH``; blank lines and lines that begin with ``#`` are skipped.
HASH is one of

* ``$argon2id$v=19$m=...,t=...,p=...$SALT$HASH`` (the PHC string that argon2 tools write): harder to guess if the file
  is stolen; serves PLAIN and LOGIN;
* ``SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY`` (RFC 5803 with SHA-256, as PostgreSQL keeps it): serves
  SCRAM-SHA-256, PLAIN and LOGIN; with SCRAM only the user ever has the password.

SCRAM-SHA-256 is announced only if every user has the second kind: clients prefer SCRAM, and would fail with the first.

An unknown name takes as long as a known one with a wrong password: a real hash, with the parameters of most users, is
computed and compared. Nothing that blocks runs on the event loop, and the number of hashing threads is bounded, so a
crowd of guessers can exhaust neither the loop nor the memory.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import argon2
import scramp

from otel_smtp.server.errors import UsersFileError
from otel_smtp.smtp.sasl import (
    Password,
    SaslError,
    decode_base64,
    prepare_name,
)

logger: Final = logging.getLogger("otel_smtp.server.users")

SCRAM_ITERATIONS: Final = 15_000
"""RFC 7677 4 demands at least 4096; this is MongoDB's default, some milliseconds for a client."""

MAX_SCRAM_ITERATIONS: Final = 1_000_000
"""More would occupy a hashing thread for seconds at each PLAIN."""

MAX_ARGON2_KIB: Final = 1024 * 1024
"""One GiB per check; the strongest recommendation of RFC 9106 4 is two, too much for a relay."""

HASHING_THREADS: Final = 2
HASHING_NICENESS: Final = 10
"""Concurrent hashes: 19 MiB each with our own parameters, in a process that may be a sidecar of 128 MiB."""

# OWASP's and RFC 9106's advice for machines without memory to spare: 19 MiB, two passes, one lane; some 25 ms.
_HASHER: Final = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
_SCRAM: Final = scramp.ScramMechanism("SCRAM-SHA-256")
_PHC = re.compile(r"\$argon2id\$v=19\$m=[0-9]{1,8},t=[0-9]{1,4},p=[0-9]{1,3}\$[A-Za-z0-9+/]{11,}\$[A-Za-z0-9+/]{16,}")
_SCRAM_LINE = re.compile(r"SCRAM-SHA-256\$([0-9]{4,7}):([^$:]+)\$([^$:]+):([^$:]+)")


class Proof(Protocol):
    """The hash or keys against which a user's password is checked."""

    def is_proven_by(self, password: str) -> bool:
        """Whether `password` is right; takes milliseconds by design, so never call it on the event loop."""
        ...

    def decoy(self) -> "Proof":
        """A proof of the same cost that no password satisfies."""
        ...

    @property
    def cost(self) -> str:
        """The cost of a check, as a value that is equal for equal cost."""
        ...


@dataclass(frozen=True, slots=True)
class Argon2Hash:
    """An argon2id hash in PHC form."""

    phc: str = field(repr=False)

    def is_proven_by(self, password: str) -> bool:
        """See `Proof`."""
        try:
            return _HASHER.verify(self.phc, _prepared(password))
        except argon2.exceptions.VerifyMismatchError:
            return False

    def decoy(self) -> "Argon2Hash":
        """See `Proof`."""
        parameters = argon2.extract_parameters(self.phc)
        return Argon2Hash(argon2.PasswordHasher.from_parameters(parameters).hash(secrets.token_hex()))

    @property
    def cost(self) -> str:
        """See `Proof`."""
        return "argon2id " + self.phc.split("$")[3]  # m, t and p


@dataclass(frozen=True, slots=True)
class ScramKeys:
    """The keys that a SCRAM-SHA-256 server stores (RFC 5802 3)."""

    iterations: int
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    def is_proven_by(self, password: str) -> bool:
        """See `Proof`."""
        try:
            _, stored_key, _, _ = _SCRAM.make_auth_info(password, iteration_count=self.iterations, salt=self.salt)
        except scramp.ScramException:  # characters that SASLprep forbids
            return False
        return hmac.compare_digest(stored_key, self.stored_key)

    def decoy(self) -> "ScramKeys":
        """See `Proof`."""
        return ScramKeys(
            self.iterations, secrets.token_bytes(len(self.salt)), secrets.token_bytes(32), secrets.token_bytes(32)
        )

    @property
    def cost(self) -> str:
        """See `Proof`."""
        return f"SCRAM-SHA-256 i={self.iterations}"


class Users:
    """The users of a listener, with their password checks.

    Args:
        proofs: by name, as `prepare_name` has it.
    """

    def __init__(self, proofs: Mapping[str, Proof]) -> None:
        self._proofs = dict(proofs)
        self._stranger = _typical(list(self._proofs.values())).decoy()
        # Per user, a digest of the last right password, under a key that dies with the process: an application's second
        # AUTH costs microseconds, a wrong guess the full hash.
        self._proven: dict[str, bytes] = {}
        self._proven_key = secrets.token_bytes(32)
        self._threads = ThreadPoolExecutor(HASHING_THREADS, "otel-smtp-passwords", initializer=_give_way)
        # Derived from the file, not random: salts for unknown names must not change between connections or worker
        # processes, or they could be told from users'.
        secret = hashlib.sha256(b"strangers")
        for name, proof in sorted(self._proofs.items()):
            secret.update(f"{name}\0{proof.server_key.hex() if isinstance(proof, ScramKeys) else ''}\0".encode())
        self._stranger_secret = secret.digest()

    def __len__(self) -> int:
        return len(self._proofs)

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """The mechanisms that work for every user, the best first."""
        if self._proofs and all(isinstance(proof, ScramKeys) for proof in self._proofs.values()):
            return ("SCRAM-SHA-256", "PLAIN", "LOGIN")
        return ("PLAIN", "LOGIN")

    async def has(self, credentials: Password) -> bool:
        """Whether there is a user with this name and password."""
        name, password = credentials.name, credentials.password
        digest = hashlib.blake2b(f"{name}\0{password}".encode(), key=self._proven_key).digest()
        if hmac.compare_digest(self._proven.get(name, b""), digest):
            return True
        proof = self._proofs.get(name, self._stranger)
        is_proven = await asyncio.get_running_loop().run_in_executor(self._threads, proof.is_proven_by, password)
        if not is_proven or name not in self._proofs:
            return False
        self._proven[name] = digest
        return True

    def knows(self, name: str) -> bool:
        """Whether there is a user of this name. Never let a client learn the answer."""
        return name in self._proofs

    def scram_keys(self, name: str) -> ScramKeys:
        """The keys of a user; for any other name, stable keys that no password fits."""
        stranger_keys = self._stranger_keys(name)
        keys = self._proofs.get(name)
        return keys if isinstance(keys, ScramKeys) else stranger_keys

    def _stranger_keys(self, name: str) -> ScramKeys:
        def derive(purpose: str) -> bytes:
            return hmac.digest(self._stranger_secret, f"{purpose}\0{name}".encode(), "sha256")

        typical = self._stranger if isinstance(self._stranger, ScramKeys) else None
        salt_octets = len(typical.salt) if typical else 32
        iterations = typical.iterations if typical else SCRAM_ITERATIONS
        return ScramKeys(iterations, derive("salt")[:salt_octets], derive("stored"), derive("server"))


def _give_way() -> None:
    """Lower the priority, so that mail goes first on few processors. On Linux this affects only the thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a unit that filters system calls, like ours, may forbid it
            os.nice(HASHING_NICENESS)


def load_users(path: str | Path) -> Users:
    """Read a users file.

    Raises:
        UsersFileError: it cannot be read, or a line is malformed.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.stat().st_mode & stat.S_IROTH:
            logger.warning("users file readable by every user", extra={"path": str(path)})
    except OSError as error:
        raise UsersFileError(path, None, f"cannot be read: {error.strerror}") from error
    proofs: dict[str, Proof] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            text = line.decode("utf-8").strip()
            if not text or text.startswith("#"):
                continue
            name, proof = _parse_line(text)
            if name in proofs:
                raise ValueError("a user of that name stands in an earlier line")
            proofs[name] = proof
        except UnicodeDecodeError:
            raise UsersFileError(path, number, "not UTF-8") from None
        except ValueError as error:
            raise UsersFileError(path, number, str(error)) from None
    return Users(proofs)


def users_line(name: str, password: str, *, scram: bool = False) -> str:
    """Make a line for the users file, without its line end.

    Args:
        scram: keep SCRAM-SHA-256 keys instead of an argon2id hash.

    Raises:
        ValueError: the file cannot hold the name, or no client can send the password.
    """
    name = _checked_name(name)
    if not password or "\0" in password:
        raise ValueError("a password must not be empty or contain NUL")
    try:
        password.encode()
    except UnicodeEncodeError:  # input that was not UTF-8
        raise ValueError("the password is not UTF-8, the encoding that clients send (RFC 4616 2)") from None
    if not scram:
        return f"{name}:{_HASHER.hash(_prepared(password))}"
    try:
        salt, stored_key, server_key, iterations = _SCRAM.make_auth_info(password, iteration_count=SCRAM_ITERATIONS)
    except scramp.ScramException as error:
        raise ValueError("the password holds characters that SCRAM forbids") from error
    return f"{name}:SCRAM-SHA-256${iterations}:{_b64(salt)}${_b64(stored_key)}:{_b64(server_key)}"


def _parse_line(text: str) -> tuple[str, Proof]:
    name, colon, hashed = text.partition(":")
    if not colon:
        raise ValueError("no colon between name and hash")
    name = _checked_name(name)
    if _PHC.fullmatch(hashed) is not None:
        cost = argon2.extract_parameters(hashed)
        lanes = cost.parallelism
        if lanes < 1 or cost.time_cost < 1 or not 8 * lanes <= cost.memory_cost <= MAX_ARGON2_KIB:  # RFC 9106 3.1
            raise ValueError("argon2id parameters out of range")
        return name, Argon2Hash(hashed)
    match = _SCRAM_LINE.fullmatch(hashed)
    if match is None:
        raise ValueError("not a hash that this program makes (see `otel-smtp passwd`)")
    iterations = int(match[1])
    try:
        salt, stored_key, server_key = (decode_base64(part.encode()) for part in match.groups()[1:])
    except SaslError as error:
        raise ValueError(f"malformed SCRAM keys: {error}") from None
    if not 4096 <= iterations <= MAX_SCRAM_ITERATIONS or len(salt) < 12 or {len(stored_key), len(server_key)} != {32}:
        raise ValueError("SCRAM keys out of range")
    return name, ScramKeys(iterations, salt, stored_key, server_key)


def _checked_name(name: str) -> str:
    try:
        prepared = prepare_name(name)
    except SaslError:
        raise ValueError("not a user name: empty, longer than 255 octets, or with control characters") from None
    if ":" in prepared or prepared.startswith("#") or prepared != prepared.strip():
        raise ValueError("a user name holds no colon, does not begin with '#' and has no blanks around it")
    return prepared


def _typical(proofs: list[Proof]) -> Proof:
    """A proof with the most frequent cost."""
    if not proofs:
        return Argon2Hash(_HASHER.hash(secrets.token_hex()))
    costs = [proof.cost for proof in proofs]
    return proofs[costs.index(Counter(costs).most_common(1)[0][0])]


def _prepared(password: str) -> str:
    # Keyboards differ in how they compose an accented letter (RFC 8265 4.2.1: NFC).
    return unicodedata.normalize("NFC", password)


def _b64(octets: bytes) -> str:
    return base64.b64encode(octets).decode("ascii")
