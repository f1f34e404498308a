"""The image: what it is made of is pinned, and its defaults admit private networks only."""

import re
import subprocess
import sys
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement

from otel_smtp.config import load

DEPLOY: Final = Path(__file__).parent.parent.parent / "deploy"
DOCKERFILE: Final = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
LOCKS: Final = sorted((DEPLOY / "image").glob("*.lock"))
PROJECT: Final = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8"))


def locked(path: Path) -> dict[str, Requirement]:
    """The requirements of a lock, by name."""
    lines = path.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    requirements = (Requirement(line.partition("--hash")[0]) for line in lines if line.strip())
    return {requirement.name: requirement for requirement in requirements}


def test_the_base_is_pinned_by_digest() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert set(bases) == {"${PYTHON}"}
    (base,) = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.1\d-slim@sha256:[0-9a-f]{64}", base)
    assert "--platform" not in "".join(re.findall(r"^FROM .*$", DOCKERFILE, re.MULTILINE)), "any platform may build it"


def test_the_image_installs_by_hash_only_and_compiles_nothing() -> None:
    installs = re.findall(r"pip install ([^\n&\\]+)", DOCKERFILE)
    assert len(installs) == 3
    for options in installs:
        assert "--require-hashes --only-binary :all:" in options or options.startswith("--no-deps dist/")


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_pins_each_part_by_hash_and_names_no_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    assert "--index" not in text
    for requirement in locked(path).values():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_the_lock_holds_what_the_package_asks_for() -> None:
    pinned = locked(DEPLOY / "image/requirements.lock")
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["postgresql"]
    for requirement in map(Requirement, wanted):
        version = str(pinned[requirement.name].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement}: renew the lock, as deploy/README.md says"
    builds = locked(DEPLOY / "image/build.lock")
    assert {Requirement(each).name for each in PROJECT["build-system"]["requires"]} <= builds.keys()


def test_the_locks_requirements_are_understood_by_pip(tmp_path: Path) -> None:
    # No network: everything is there already or left out; what counts is that pip reads the file and its hashes.
    told = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "--require-hashes",
         "--quiet", "-r", str(DEPLOY / "image/requirements.lock")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "Invalid requirement" not in told.stderr
    assert "hashes" not in told.stderr


def test_the_image_listens_on_every_interface_for_private_networks_only() -> None:
    document = tomllib.loads((DEPLOY / "image/gateway.toml").read_text(encoding="utf-8"))
    settings = load(values=document, upstream=["smtp://127.0.0.1:1025"])
    (listener,) = settings.listener
    assert listener.is_exposed
    for address, is_let_in in (
        ("172.17.0.1", True),  # the host, as Docker's own bridge shows it
        ("10.1.2.3", True),
        ("127.0.0.1", True),
        ("192.0.2.1", False),
        ("203.0.113.9", False),
        ("172.32.0.1", False),
    ):
        assert any(ip_address(address) in network for network in listener.allow) is is_let_in, address
    assert "COPY deploy/image/gateway.toml /etc/otel-smtp/gateway.toml" in DOCKERFILE
    assert "OTELSMTP_CONFIG=/etc/otel-smtp/gateway.toml" in DOCKERFILE


def test_a_variable_changes_what_the_image_says() -> None:
    settings = load(
        file=DEPLOY / "image/gateway.toml",
        environ={"OTELSMTP_UPSTREAM": "smtp://127.0.0.1:1025", "OTELSMTP_LISTENER__0__ALLOW": "192.0.2.0/24"},
    )
    assert [str(network) for network in settings.listener[0].allow] == ["192.0.2.0/24"]
