"""What the benchmark knows of a relay under measurement."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.process import Child, cpu_seconds, wait_for_greeting


class UnavailableError(Exception):
    """This relay can't be run here; the message says why. The benchmark names it as skipped."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a relay is started with.

    Attributes:
        directory: its own, empty; readable by other users where the relay drops privileges.
        cache: shared between runs: installed packages.
    """

    directory: Path
    cache: Path
    upstream_port: int
    collector_port: int


def _nothing() -> None:
    pass


@dataclass(slots=True)
class Running:
    """A relay that runs.

    Attributes:
        beside: processes that work for it and are weighed with it, as a database's.
        release: frees what was set up for it, after its end.
    """

    child: Child
    port: int
    beside: Sequence[int] = ()
    release: Callable[[], None] = _nothing

    def cpu_seconds(self) -> float:
        """User and system time of all that works for it."""
        return self.child.cpu_seconds() + self.beside_cpu_seconds()

    def beside_cpu_seconds(self) -> float:
        """That of the processes beside it."""
        return sum(map(cpu_seconds, self.beside))

    def stop(self) -> None:
        """End it."""
        self.child.stop()
        self.release()


@dataclass(frozen=True, slots=True)
class Target:
    """A relay and how to start it.

    Attributes:
        start: starts it; it need not listen yet.
        language: that it is written in; empty: unknown.
        is_gateway: it is this project's.
        exports_spans: its spans are counted at the collector, and its runs are waited for until these have come.
        answers_before_delivery: it queues: its runs last until the sink has everything.
        has_process_per_connection: thousands of idle connections are not asked of it.
    """

    name: str
    start: Callable[[Place], Running]
    language: str = ""
    is_gateway: bool = False
    exports_spans: bool = False
    answers_before_delivery: bool = False
    has_process_per_connection: bool = False

    def ready(self, place: Place) -> Running:
        """Start it and wait for its greeting.

        Raises:
            UnavailableError: it can't be run here, or it does not greet; the end of its log is told.
        """
        place.directory.mkdir(parents=True, exist_ok=True)
        try:
            running = self.start(place)
        except FileNotFoundError as missing:
            raise UnavailableError(f"not installed: {missing.filename}") from missing
        try:
            wait_for_greeting(running.port, running.child)
        except RuntimeError as silence:
            running.stop()
            raise UnavailableError(" / ".join([str(silence), *last_words(place.directory)])) from silence
        return running


def last_words(directory: Path) -> list[str]:
    """The end of a relay's log."""
    log = directory / "log"
    return log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
