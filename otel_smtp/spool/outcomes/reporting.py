"""Making and sending outcomes as one thing."""

from otel_smtp.spool.outcomes.receivers import Receivers
from otel_smtp.spool.outcomes.recording import Outcomes
from otel_smtp.spool.outcomes.sending import Sender
from otel_smtp.spool.schedule import Schedule
from otel_smtp.spool.store import Store


class OutcomeReporting:
    """Makes outcomes, and sends them.

    Attributes:
        receivers: of the outcomes. `outcomes`: makes them.
    """

    def __init__(self, store: Store, schedule: Schedule, *, hostname: str) -> None:
        self.receivers = Receivers()
        self._sender = Sender(store, self.receivers, schedule)
        self.outcomes = Outcomes(
            store, self.receivers,
            hostname=hostname, max_age_seconds=schedule.max_age_seconds, wake=self._sender.wake,
        )  # fmt: skip

    def start(self) -> None:
        """Send what waits."""
        self._sender.start()

    def look_soon(self) -> None:
        """An operator has changed an outcome."""
        self._sender.look_soon()

    async def stop(self) -> None:
        """Send no more."""
        await self._sender.stop()
