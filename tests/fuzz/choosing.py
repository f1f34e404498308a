"""Which inputs are worth keeping: the smallest that together reach most of what all of them reach."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

from tests.fuzz.targets import TARGETS

PACKAGE: Final = str(Path(__file__).resolve().parent.parent.parent / "otel_smtp")

Step = tuple[CodeType, int, int]  # from line to line, within one function


def choose(target: str, inputs: Iterable[bytes], *, most: int, most_octets: int) -> list[bytes]:
    """At most `most` of `inputs`, none longer than `most_octets`: each reaches a step that no smaller one reaches, and
    those that reach most of them come first."""
    reached: set[Step] = set()
    chosen: list[tuple[int, bytes]] = []
    for octets in sorted(set(inputs), key=lambda octets: (len(octets), octets)):
        if len(octets) > most_octets:
            break
        new = _steps(TARGETS[target], octets) - reached
        if new:
            reached |= new
            chosen.append((len(new), octets))
    chosen.sort(key=lambda one: -one[0])
    return [octets for _, octets in chosen[:most]]


def _steps(run: Callable[[bytes], None], octets: bytes) -> set[Step]:
    """The steps within the package that one input takes."""
    steps: set[Step] = set()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        last = 0

        def trace_line(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal last
            if event == "line":
                steps.add((frame.f_code, last, frame.f_lineno))
                last = frame.f_lineno
            return trace_line

        return trace_line

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run(octets)
    finally:
        sys.settrace(before)
    return steps
