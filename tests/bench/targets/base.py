"""What the benchmark knows of a relay under measurement."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.process import Child, wait_for_greeting


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


@dataclass(slots=True)
class Running:
    """A relay that runs."""

    child: Child
    port: int


@dataclass(frozen=True, slots=True)
class Target:
    """A relay and how to start it.

    Attributes:
        start: starts it; it need not listen yet.
        exports_spans: its spans are counted at the collector, and its runs are waited for until these have come.
        answers_before_delivery: it queues: its runs last until the sink has everything.
        has_process_per_connection: thousands of idle connections are not asked of it.
    """

    name: str
    start: Callable[[Place], Running]
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
            running.child.stop(patience_seconds=1)
            log = place.directory / "log"
            said = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
            raise UnavailableError(" / ".join([str(silence), *said])) from silence
        return running
