"""The package as people install it: built, put into an environment of its own, and run from there."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent.parent
# What the tests run with, in front of nothing: the wheel's own dependencies are there already, and none is fetched.
LIBRARIES: Final = next(path for path in sys.path if path.endswith("site-packages"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_page_and_its_types_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    page = {path.name for path in (ROOT / "otel_smtp/status/page").iterdir()}
    assert {f"otel_smtp/status/page/{name}" for name in page} <= names
    assert "otel_smtp/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "deploy/"))]


def test_it_runs_from_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "libraries.pth").write_text(LIBRARIES)
    script = (
        "import otel_smtp, sys; from otel_smtp.commands.cli import main; sys.argv = ['otel-smtp', '--version']; "
        "assert otel_smtp.__file__.startswith(sys.prefix), otel_smtp.__file__; main()"
    )
    done = subprocess.run(
        [tmp_path / "venv/bin/python", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "0.1.0" in done.stdout
