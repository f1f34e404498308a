"""A delivery within a queued message."""

from otel_smtp.spool.messages import DeliveryState, SpooledRecipient


class DeliveryEntry:
    """The recipients of one destination within one message."""

    __slots__ = (
        "attempts", "crashes", "destination", "due_ms", "epoch", "is_possible_duplicate", "number", "recipients",
        "state",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        destination: str,
        state: DeliveryState,
        attempts: int,
        crashes: int,
        due_ms: int,
        epoch: int,
        is_possible_duplicate: bool,
        recipients: list[SpooledRecipient],
    ) -> None:
        self.number = number
        self.destination = destination
        self.state = state
        self.attempts = attempts
        self.crashes = crashes
        self.due_ms = due_ms
        self.epoch = epoch
        self.is_possible_duplicate = is_possible_duplicate
        self.recipients = recipients

    def copy(self) -> "DeliveryEntry":
        """One that can be changed without changing this one."""
        return DeliveryEntry(
            self.number, self.destination, self.state, self.attempts, self.crashes, self.due_ms, self.epoch,
            self.is_possible_duplicate, self.recipients,
        )  # fmt: skip

    @property
    def is_pending(self) -> bool:
        """Whether it waits for an attempt or for expiry, rather than for an operator."""
        return self.state is DeliveryState.READY or self.state is DeliveryState.LEASED

    def lease(self) -> None:
        """Lease it for an attempt."""
        self.state = DeliveryState.LEASED
        self.epoch += 1
