"""Users files whose hashes cost next to nothing."""

from pathlib import Path

import argon2

# As weak as argon2 goes: what is tested is not its strength.
QUICK = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


def quick_line(name: str, password: str) -> str:
    return f"{name}:{QUICK.hash(password)}"


def written(directory: Path, *lines: str) -> Path:
    path = directory / "users"
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    path.chmod(0o600)
    return path
