"""One target under libFuzzer, which ends the process: `python -m tests.fuzz.process TARGET [libFuzzer's arguments]`."""

import importlib
import sys
from typing import Any


def main() -> None:
    """Instrument the package, then run the target until libFuzzer has had enough."""
    target, *arguments = sys.argv[1:]
    atheris: Any = importlib.import_module("atheris")  # ships no types, and is not there where tests only replay
    with atheris.instrument_imports(include=["otel_smtp"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *arguments], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
