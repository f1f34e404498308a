"""The spool as a whole, as the gateway builds, starts and stops it."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from otel_smtp.forwarding.base import Forwarder, Relay
from otel_smtp.observing import Observer
from otel_smtp.spool.deeds import note_crashes
from otel_smtp.spool.dsn.notices import BouncePolicy, Notices
from otel_smtp.spool.forwarders import DirectThenQueueForwarder, SpoolForwarder
from otel_smtp.spool.intake import Intake
from otel_smtp.spool.messages import Company, Counts, MessageView, SpoolError, StorageAway
from otel_smtp.spool.operators import ControlSocket, Operations
from otel_smtp.spool.runner import AWAY_SECONDS, Runner
from otel_smtp.spool.schedule import Schedule
from otel_smtp.spool.store import Store

if TYPE_CHECKING:
    from otel_smtp.spool.outcomes.receivers import OutcomeFigures, ReceiverSettings
    from otel_smtp.spool.outcomes.reporting import OutcomeReporting

logger: Final = logging.getLogger("otel_smtp.spool.service")


@dataclass(frozen=True, slots=True)
class SpoolSettings:
    """The settings of a spool.

    Attributes:
        control_path: the socket for operators' commands; None: commands use the store directly.
        hostname: our own, for notices.
        notice_sender: their reverse-path for upstreams that refuse the null one, or "".
    """

    control_path: Path | None
    schedule: Schedule
    bounce: BouncePolicy
    hostname: str
    notice_sender: str = ""


class Spool:
    """One spool with all its parts.

    Args:
        store: not opened yet.
        relay: delivers mail, with a verdict for each recipient, and notifies `observer` of each attempt.
        direct: asked first, if given, so that the spool takes only mail that it cannot deliver now.
        observer: gives the trace context to store with a message.

    Attributes:
        store, runner: for inspection.
        operations: the operators' commands.
    """

    def __init__(
        self, settings: SpoolSettings, store: Store, relay: Relay, direct: Forwarder | None, observer: Observer
    ) -> None:
        schedule = settings.schedule
        self.store = store
        notices = Notices(
            store,
            relay,
            policy=settings.bounce,
            hostname=settings.hostname,
            max_age_seconds=schedule.max_age_seconds,
            sender=settings.notice_sender,
        )
        self.runner = Runner(store, relay, notices, schedule, observer)
        self._observer = observer
        self._settings = settings
        self._reporting: OutcomeReporting | None = None
        self._is_running = False
        intake = Intake(
            store,
            relay,
            self.runner,
            observer,
            max_age_seconds=schedule.max_age_seconds,
            first_wait_seconds=lambda: schedule.next_delay(1, random.random()),  # noqa: S311 - jitter, no secret
        )
        self.forwarder: Forwarder = SpoolForwarder(intake)
        if direct is not None:
            self.forwarder = DirectThenQueueForwarder(direct, intake)
        self.operations = Operations(store, self.runner, max_age_seconds=schedule.max_age_seconds)
        self._control: ControlSocket | None = None
        if settings.control_path is not None:
            self._control = ControlSocket(settings.control_path, self.operations)

    async def start(self, opened: Callable[[], None] | None = None) -> None:
        """Open the store, and begin to deliver.

        Args:
            opened: called once the store is ours, before the first attempt.

        Raises:
            SpoolError: it cannot be used.
            OSError: the operators' socket cannot be bound.
        """
        recovery = await self.store.open()
        if opened is not None:
            opened()
        if recovery.messages:
            logger.info(
                "queued mail found",
                extra={"messages": recovery.messages, "interrupted_attempts": recovery.interrupted},
            )
        for deed in await self.store.take_deeds():
            self.runner.note(deed)
        for message_id in recovery.held:
            note_crashes(await self.store.show(message_id), self._observer)
        for message_id in recovery.lost:
            logger.critical("queued content missing", extra={"spool_id": message_id})
        for remark in recovery.remarks:
            logger.warning(remark)
        for alarm in recovery.alarms:
            logger.critical(alarm)
        if self._control is not None:
            await self._control.start()
        await self.runner.start()
        self._is_running = True
        if self._reporting is not None:
            self._reporting.start()

    async def stop(self, *, grace_seconds: float, before_leaving: Callable[[], Awaitable[None]] | None = None) -> None:
        """Begin no more attempts, let those under way end within the grace period, and close the store.

        Args:
            before_leaving: called when no attempt is under way, and the store is still ours.
        """
        if self._control is not None:
            await self._control.stop()
        await self.runner.stop(grace_seconds=grace_seconds)
        self._is_running = False
        if self._reporting is not None:
            await self._reporting.stop()
        if before_leaving is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AWAY_SECONDS if isinstance(self.store.refusal(), StorageAway) else None):
                    await before_leaving()
        await self.store.close()

    def report_to(self, receivers: "Sequence[ReceiverSettings]") -> None:
        """From now on, report each recipient's outcome to these receivers. Without any, nothing is imported."""
        if self._reporting is None:
            if not receivers:
                return
            from otel_smtp.spool.outcomes.reporting import OutcomeReporting

            settings = self._settings
            self._reporting = OutcomeReporting(self.store, settings.schedule, hostname=settings.hostname)
            self.runner.report_outcomes(self._reporting.outcomes)
            self.operations.outcomes_changed = self._reporting.look_soon
            if self._is_running:
                self._reporting.start()
        self._reporting.receivers.replace(receivers)

    def receivers(self) -> "Sequence[tuple[str, OutcomeFigures, int, float | None]]":
        """The receivers of outcomes: name, figures, number waiting, and the oldest's time in Unix seconds."""
        return () if self._reporting is None else self._reporting.receivers.figures()

    def problem(self) -> str | None:
        """Why no mail is accepted now, or an operator must act, for health checks."""
        refusal = self.store.refusal()
        return str(refusal) if refusal is not None else self.store.alarm()

    @property
    def counts(self) -> Counts:
        """The counts, a few seconds old."""
        return self.runner.counts

    @property
    def oldest(self) -> Sequence[MessageView]:
        """The oldest messages, a few seconds ago."""
        return self.runner.oldest

    @property
    def company(self) -> Company | None:
        """The gateways that share the queue, a few seconds ago; None: it is not shared."""
        return self.runner.company


__all__ = ["Spool", "SpoolError", "SpoolSettings"]
