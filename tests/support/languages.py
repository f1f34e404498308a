"""Other languages, for the README's recipes: their libraries are installed once, and a program is run with a recipe.

Where a language or its registry is missing, the test is skipped for all to see, in CI as well: no machine has them all.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.support import nodemailer
from tests.support.installing import NPM, NotInstalledError, installed

RUN_SECONDS: Final = 90.0

NODE_PACKAGES: Final = (
    f"nodemailer@{nodemailer.VERSION}",
    "@opentelemetry/api@1.9.0",
    "@opentelemetry/core@2.0.0",
    "@opentelemetry/context-async-hooks@2.0.0",
)
GO_MODULES: Final = ("github.com/wneessen/go-mail@v0.8.1", "go.opentelemetry.io/otel@v1.40.0")
_POM: Final = """<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>recipe</groupId><artifactId>recipe</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.eclipse.angus</groupId><artifactId>angus-mail</artifactId><version>2.0.3</version></dependency>
    <dependency><groupId>io.opentelemetry</groupId><artifactId>opentelemetry-api</artifactId><version>1.50.0</version></dependency>
  </dependencies>
</project>
"""


def run_node(directory: Path, files: Mapping[str, str]) -> None:
    """Run `main.js` of `files`."""
    modules = _installed("node", _install_node, "node", "npm") / "node_modules"
    _write(directory, files)
    _run(["node", "main.js"], directory, NODE_PATH=str(modules))


def run_java(directory: Path, files: Mapping[str, str]) -> None:
    """Compile `files` and run the class `Main`."""
    jars = _installed("java", _install_java, "java", "javac", "mvn") / "jars"
    _write(directory, files)
    _run(["javac", "-cp", f"{jars}/*", *files], directory)
    _run(["java", "-cp", f"{jars}/*:.", "Main"], directory)


def run_go(directory: Path, files: Mapping[str, str]) -> None:
    """Run the package that `files` make up."""
    module = _installed("go", _install_go, "go")
    _write(directory, {**files, **{name: (module / name).read_text() for name in ("go.mod", "go.sum")}})
    _run(["go", "run", "."], directory, GOFLAGS="-mod=mod", GOPROXY="off")


def _write(directory: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


def _run(command: Sequence[str], directory: Path, **environ: str) -> None:
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def _install_node(home: Path) -> list[str]:
    return [*NPM, f"--prefix={home}", *NODE_PACKAGES]


def _install_java(home: Path) -> list[str]:
    (home / "pom.xml").write_text(_POM)
    return ["mvn", "-q", "-B", "dependency:copy-dependencies", f"-DoutputDirectory={home / 'jars'}"]


def _install_go(home: Path) -> list[str]:
    (home / "go.mod").write_text("module recipe\n\ngo 1.24\n")
    # `go get` records the sums of those packages only that a program of the module imports.
    imports = ("github.com/wneessen/go-mail", "go.opentelemetry.io/otel", "go.opentelemetry.io/otel/propagation")
    lines = [f'import _ "{name}"' for name in (*imports, "go.opentelemetry.io/otel/trace")]
    (home / "main.go").write_text("\n".join(["package main", *lines, "func main() {}", ""]))
    return ["go", "get", *GO_MODULES]


def _installed(name: str, prepare: Callable[[Path], Sequence[str]], *programs: str) -> Path:
    """The directory with what a language needs."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    libraries = hashlib.sha256(repr((NODE_PACKAGES, GO_MODULES, _POM)).encode()).hexdigest()
    try:
        return installed(f"recipes-{name}-{libraries[:12]}", prepare)
    except NotInstalledError as problem:
        pytest.skip(str(problem))
