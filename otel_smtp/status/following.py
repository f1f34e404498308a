"""Following a gateway's mails: a request waits until there is a line, and returns all lines since the last one.

Nothing is pushed, so a slow reader holds nothing up; it learns how many lines it missed. Lines are kept from the first
request on, until there has been none for a while.
"""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from otel_smtp.status.search import RecordedMailbox, TraceIndex, parse
from otel_smtp.status.siblings import Siblings

FOLLOWERS: Final = 16
LINES_AT_ONCE: Final = 500
WAIT_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.25
LINGER_SECONDS: Final = 30.0  # a request waits for less, and the next one comes at once

_CURSOR: Final = re.compile(r"(\d{1,4}):(\d{1,18})")
# Outcomes without a problem.
_GOOD_OUTCOMES: Final = frozenset({"relayed", "queued"})


class LogLine(Protocol):
    """One line of the log."""

    @property
    def number(self) -> int: ...
    @property
    def time(self) -> float: ...
    @property
    def text(self) -> str: ...
    @property
    def outcome(self) -> str: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...


class Tail(Protocol):
    """Keeps the last lines of this process while it is started."""

    @property
    def is_started(self) -> bool: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    async def last(self) -> int:
        """The number of the last line."""
        ...

    async def after(self, number: int, most: int) -> tuple[Sequence[LogLine], int, int]:
        """The lines after one, the number to ask with next, and how many were missed."""
        ...


class Following:
    """Answers followers.

    Args:
        tail: of this process.
        recorded: the form of a wanted address in the lines.
        siblings: the gateway's other processes.
        number: of this process.
        wait_seconds: how long a request waits for a line.
    """

    def __init__(
        self,
        tail: Tail,
        recorded: RecordedMailbox,
        siblings: Siblings | None = None,
        *,
        number: int = 0,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self._tail = tail
        self._recorded = recorded
        self._siblings = siblings
        self._number = number
        self._wait_seconds = wait_seconds
        self._followers = 0
        self._ending: asyncio.TimerHandle | None = None

    @property
    def is_full(self) -> bool:
        """Whether no further follower is accepted."""
        return self._followers >= FOLLOWERS

    async def answer(self, parameters: Mapping[str, str], stopping: asyncio.Event) -> dict[str, Any]:
        """The lines that came after `after`; without it, where to begin.

        Args:
            parameters: `after`, from the answer before; `q`, see `search`; `only`, `errors` or outcomes with commas
                between them; `wait=no`.
            stopping: ends the wait.
        """
        self._linger()
        query = parse(parameters.get("q", ""), self._recorded)
        notes = {"notes": query.notes}
        after = _positions(parameters.get("after", ""))
        if not after:
            return {"after": _cursor(await self._begin()), "lines": [], "missed": 0, **notes}
        only = frozenset(filter(None, parameters.get("only", "").split(",")))

        def is_wanted(line: Mapping[str, Any]) -> bool:
            outcome = line["outcome"]
            if only and outcome not in only and ("errors" not in only or outcome in _GOOD_OUTCOMES):
                return False
            fields = line["fields"]
            return not query.words or TraceIndex(fields.get("trace_id", ""), [fields], [line["text"]]).has(query)

        ends = time.monotonic() + (0.0 if parameters.get("wait") == "no" else self._wait_seconds)
        missed = 0
        self._followers += 1
        try:
            while True:
                come, lost = await self._read(after)
                missed += lost
                lines = [line for line in come if is_wanted(line)]
                if lines or missed or stopping.is_set() or time.monotonic() >= ends:
                    lines.sort(key=lambda line: float(line["time"]))
                    return {"after": _cursor(after), "lines": lines, "missed": missed, **notes}
                await asyncio.sleep(POLL_SECONDS)
        finally:
            self._followers -= 1

    def stop(self) -> None:
        """Stop keeping lines."""
        if self._ending is not None:
            self._ending.cancel()
        self._tail.stop()

    def _linger(self) -> None:
        self._tail.start()
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._tail.stop)

    async def _begin(self) -> dict[int, int]:
        after = {self._number: await self._tail.last()}
        for number, answer in (await self._ask("/api/tail?wait=no")).items():
            after[number] = _positions(answer["after"])[number]
        return after

    async def _read(self, after: dict[int, int]) -> tuple[list[Mapping[str, Any]], int]:
        """The lines of all processes, and how many were missed; advances `after`."""
        asked = f"/api/tail?wait=no&after={_cursor(after)}"
        # A process started since is read from its first line.
        own, following, missed = await self._tail.after(after.get(self._number, 0), LINES_AT_ONCE)
        after[self._number] = following
        lines = [_as_value(line) for line in own]
        for number, answer in (await self._ask(asked)).items():
            after[number] = _positions(answer["after"])[number]
            lines += answer["lines"]
            missed += answer["missed"]
        return lines, missed

    async def _ask(self, path: str) -> Mapping[int, Any]:
        return {} if self._siblings is None else await self._siblings.ask_json(path)


def _positions(cursor: str) -> dict[int, int]:
    return {int(number): int(line) for number, line in _CURSOR.findall(cursor)}


def _cursor(after: Mapping[int, int]) -> str:
    return ",".join(f"{number}:{line}" for number, line in sorted(after.items()))


def _as_value(line: LogLine) -> Mapping[str, Any]:
    return {"time": line.time, "text": line.text, "outcome": line.outcome, "fields": line.fields}
