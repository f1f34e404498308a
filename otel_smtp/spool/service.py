"""The spool as one thing: what `app` builds, starts and stops."""

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from otel_smtp.forwarding.base import Forwarder, Relay
from otel_smtp.observing import Observer
from otel_smtp.spool.control import ControlSocket, Operations
from otel_smtp.spool.files import SpoolDirectory
from otel_smtp.spool.forwarder import DirectThenQueueForwarder, Intake, SpoolForwarder
from otel_smtp.spool.messages import Counts, Shown, SpoolError
from otel_smtp.spool.notices import BouncePolicy, Notices
from otel_smtp.spool.runner import Runner
from otel_smtp.spool.schedule import Schedule
from otel_smtp.spool.store import DEFAULT_LEAST_FREE_OCTETS, SpoolStore

logger: Final = logging.getLogger("otel_smtp.spool.service")


@dataclass(frozen=True, slots=True)
class SpoolSettings:
    """What a spool is to be.

    Attributes:
        hostname: ours, for notices.
        least_free_octets: below, no new mail is taken.
    """

    directory: Path
    schedule: Schedule
    bounce: BouncePolicy
    hostname: str
    least_free_octets: int = DEFAULT_LEAST_FREE_OCTETS


class Spool:
    """One spool with everything that belongs to it.

    Args:
        relay: delivers what is due, with a verdict for each recipient.
        direct: asked first, before anything is queued; None: everything is queued.
        observer: told of each attempt.
        clock: the wall clock, in seconds since the epoch, by which mail ages.

    Attributes:
        store, runner: for whoever looks into them.
    """

    def __init__(
        self,
        settings: SpoolSettings,
        relay: Relay,
        direct: Forwarder | None,
        observer: Observer,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        schedule = settings.schedule
        self.store = SpoolStore(SpoolDirectory(settings.directory), least_free_octets=settings.least_free_octets)
        notices = Notices(self.store, relay, policy=settings.bounce, hostname=settings.hostname)
        self.runner = Runner(self.store, relay, notices, schedule, clock=clock)
        intake = Intake(
            self.store,
            relay,
            self.runner,
            observer,
            max_age_seconds=schedule.max_age_seconds,
            first_wait_seconds=lambda: schedule.next_delay(1, random.random()),  # noqa: S311 - jitter, no secret
        )
        self.forwarder: Forwarder = SpoolForwarder(intake)
        if direct is not None:
            self.forwarder = DirectThenQueueForwarder(direct, intake)
        operations = Operations(self.store, self.runner, max_age_seconds=schedule.max_age_seconds)
        self._control = ControlSocket(self.store.directory.control_path, operations)

    async def start(self) -> None:
        """Own the directory, and begin with what is in it.

        Raises:
            SpoolError: it cannot be used.
            OSError: the operators' socket cannot be bound.
        """
        recovery = await self.store.open()
        if recovery.messages:
            logger.info(
                "mail is queued",
                extra={"messages": recovery.messages, "interrupted_attempts": recovery.interrupted},
            )
        for message_id in recovery.held:
            logger.critical("held: it was part of too many crashes", extra={"spool_id": message_id})
        for message_id in recovery.lost:
            logger.critical("its content is missing", extra={"spool_id": message_id})
        await self._control.start()
        await self.runner.start()

    async def stop(self, *, grace_seconds: float) -> None:
        """Begin no attempt any more, let those under way end within the grace, and give the directory up."""
        await self._control.stop()
        await self.runner.stop(grace_seconds=grace_seconds)
        await self.store.close()

    def problem(self) -> str | None:
        """Why no mail can be taken now, for probes."""
        refusal = self.store.refusal()
        return str(refusal) if refusal is not None else None

    @property
    def counts(self) -> Counts:
        """How much there is of what, a few seconds old."""
        return self.runner.counts

    @property
    def oldest(self) -> Sequence[Shown]:
        """The oldest messages, a few seconds ago."""
        return self.runner.oldest


__all__ = ["Spool", "SpoolError", "SpoolSettings"]
