"""Several observers as one, each kept from harming the others and the mail.

The dispatch of every hook is derived from `Observer`: a hook added there is dispatched without further code.

Successful transactions wait here for a moment, to be passed to `transactions_settled` together; so do successful
attempts from the spool, for `deliveries_settled`. Nothing writes to such a record or its deliveries any more, and the
connection's segment that holds it stays open until it is passed on.
"""

import difflib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

from otel_smtp.observing.interface import HOOKS, Observer
from otel_smtp.observing.records import ConnectionRecord, DeliveryRecord, TransactionRecord
from otel_smtp.observing.values import Outcome

logger: Final = logging.getLogger("otel_smtp.observing")

# The gateway's own observers. `StateCallback` is not among them: what it calls is a program's.
_OURS: Final = ("otel_smtp.telemetry.", "otel_smtp.status.")
# A fault costs mail about as much as a span does, and what it leaves half done may add up.
MOST_FAULTS: Final = 1000

# The most records that wait: processing them takes half a millisecond, twice that with an access log, and mail waits
# meanwhile. Most batches end sooner, by time: 25 mails at five thousand per second.
MOST_WAITING: Final = 64

_TRACE_ID: Final = re.compile(r"[0-9a-f]{32}")  # W3C Trace Context 3.2.2.3

_RELAYED: Final = Outcome.RELAYED  # looking a member up in its class costs as much as a call
_QUEUED: Final = Outcome.QUEUED

Soon = Callable[[Callable[[], None]], None]
"""Schedules a function: it is called within a few milliseconds on the event loop, or at once."""


class _Member:
    """One observer, and whether it is dropped.

    A program's observer is dropped as soon as it raises. The gateway's own are not: one odd record that brings out a
    fault in them must not end the traces of all mail. They are dropped once they have failed `MOST_FAULTS` times.
    """

    __slots__ = ("_faults", "is_dropped", "is_ours", "observer")

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.is_ours = type(observer).__module__.startswith(_OURS)
        self.is_dropped = False
        self._faults = 0

    def failed(self, hook: str, error: BaseException) -> None:
        """Log the current exception, the first time, and drop the member if required.

        A hook never awaits, so a CancelledError out of it is its own fault: from a future that it read, say.

        Raises:
            KeyboardInterrupt, SystemExit: the observer raised it, and the process must end.
        """
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        if self.is_dropped:
            return
        self._faults += 1
        self.is_dropped = not self.is_ours or self._faults >= MOST_FAULTS
        about = {"observer": type(self.observer).__qualname__, "hook": hook}
        if self.is_dropped:
            logger.exception("observer raised and is dropped; mail is unaffected", extra=about)
        elif self._faults == 1:
            logger.exception("observer raised, telemetry is incomplete; mail is unaffected", extra=about)


class FanOut(Observer):
    """See `fan_out`.

    Attributes:
        wants_transitions: an observer overrides `conn_state`, so it must be called.
    """

    def __init__(self, observers: Iterable[Observer], soon: Soon | None = None) -> None:
        members = [_Member(observer) for observer in observers]
        for hook, asks in HOOKS.items():
            listeners = tuple(
                (member, getattr(member.observer, hook)) for member in members if _overrides(member.observer, hook)
            )
            if hook == "conn_state":
                self.wants_transitions = bool(listeners)
            # Bound to the observers that override the hook, so a call looks nothing up; without any, the interface's
            # own.
            if listeners:
                setattr(self, hook, (_asker if asks else _teller)(hook, listeners))
        self._soon = soon
        self._waiting: list[TransactionRecord] = []
        self._attempts: list[DeliveryRecord] = []  # that wait too
        self._attempted: list[TransactionRecord] = []  # the transactions of those, which they do not hold
        self._batch = 0  # the number of all those
        self._tell_delivery_at_once: Callable[[DeliveryRecord], None] | None = None
        if "deliveries_settled" in self.__dict__:
            self._tell_delivery_at_once = self.__dict__.get("delivery_ended")
            self.delivery_ended = self._delivery_ended  # type: ignore[method-assign]
        self._tell_at_once: Callable[[TransactionRecord], None] | None = None
        if "transactions_settled" in self.__dict__:
            self._tell_at_once = self.__dict__.get("transaction_ended")
            self.transaction_ended = self._transaction_ended  # type: ignore[method-assign]
            for hook in ("segment_ended", "connection_closed"):
                setattr(self, hook, partial(self._after_those_waiting, getattr(self, hook)))

    def catch_up(self) -> None:
        """Pass waiting records to the observers; call it before reading what the observers make of them."""
        waiting, attempts, attempted = self._waiting, self._attempts, self._attempted
        if not waiting and not attempts:
            return
        self._waiting, self._attempts, self._attempted = [], [], []
        self._batch += 1
        if waiting:
            self.transactions_settled(waiting)
        if attempts:
            self.deliveries_settled(attempts)
        del attempted  # those records had to stay alive until here

    def _transaction_ended(self, transaction: TransactionRecord) -> None:
        if self._tell_at_once is not None:
            self._tell_at_once(transaction)
        waiting, outcome, deliveries = self._waiting, transaction.outcome, transaction.deliveries
        waiting.append(transaction)
        if (
            self._soon is None
            or (outcome is not _RELAYED and outcome is not _QUEUED)
            or (deliveries and not deliveries[-1].ended_ns)  # each begins when the one before has ended
            or len(waiting) + len(self._attempts) >= MOST_WAITING
        ):
            self.catch_up()
        elif len(waiting) == 1 and not self._attempts:
            self._soon(partial(self._catch_up_with, self._batch))

    def _delivery_ended(self, delivery: DeliveryRecord) -> None:
        if self._tell_delivery_at_once is not None:
            self._tell_delivery_at_once(delivery)
        transaction, attempts = delivery.transaction, self._attempts
        attempts.append(delivery)
        self._attempted.append(transaction)
        waiting = len(attempts) + len(self._waiting)
        if (
            self._soon is None
            or delivery.outcome is not _RELAYED
            or transaction.connection is not None
            or waiting >= MOST_WAITING
        ):
            self.catch_up()
        elif waiting == 1:
            self._soon(partial(self._catch_up_with, self._batch))

    def _catch_up_with(self, batch: int) -> None:
        if batch == self._batch:  # otherwise it has been reported already
            self.catch_up()

    def _after_those_waiting(self, tell: Callable[[ConnectionRecord], None], connection: ConnectionRecord) -> None:
        self.catch_up()
        tell(connection)


_Listeners = tuple[tuple[_Member, Callable[..., Any]], ...]


def _overrides(observer: Observer, hook: str) -> bool:
    return getattr(type(observer), hook) is not getattr(Observer, hook) or hook in getattr(observer, "__dict__", ())


def _teller(hook: str, listeners: _Listeners) -> Callable[..., None]:
    def tell(*about: Any) -> None:
        for member, method in listeners:
            if not member.is_dropped:
                try:
                    method(*about)
                except BaseException as error:  # noqa: BLE001 - telemetry never touches mail
                    member.failed(hook, error)

    def tell_one(record: Any) -> None:
        """As `tell`, for one argument: nearly all hooks have one, and this runs several times per mail."""
        for member, method in listeners:
            if not member.is_dropped:
                try:
                    method(record)
                except BaseException as error:  # noqa: BLE001 - as above
                    member.failed(hook, error)

    return tell_one if _takes_one(hook) else tell


def _asker(hook: str, listeners: _Listeners) -> Callable[..., Any]:
    no_answer = getattr(Observer(), hook)(None)  # what the interface itself says
    kind, is_answer = (str, _is_trace_id) if hook == "trace_id" else (dict, _is_carrier)
    kinds: set[type] = {kind}  # of answers by an observer of ours that need no look: with those of which one was right

    def ask(record: Any) -> Any:
        for member, method in listeners:
            if not member.is_dropped:
                try:
                    if answer := method(record):
                        return _checked(answer, is_answer)
                except BaseException as error:  # noqa: BLE001 - telemetry never touches mail
                    member.failed(hook, error)
        return no_answer

    [(member, method), *others] = listeners

    def ask_one(record: Any) -> Any:
        """As `ask`, if only one observer of ours could answer: the case of every mail."""
        if member.is_dropped:
            return no_answer
        try:
            answer = method(record)
            if answer.__class__ in kinds:
                return answer
            if not answer:
                return no_answer
            kinds.add(_checked(answer, is_answer).__class__)
            return answer
        except BaseException as error:  # noqa: BLE001 - as above
            member.failed(hook, error)
            return no_answer

    return ask_one if member.is_ours and not others else ask


def _checked(answer: Any, is_answer: Callable[[Any], bool]) -> Any:
    """Check an answer that may go into replies, header fields and the spool."""
    if not is_answer(answer):
        raise TypeError(f"no answer to that: {type(answer).__qualname__}")  # its text may be anything
    return answer


def _is_trace_id(answer: Any) -> bool:
    return isinstance(answer, str) and _TRACE_ID.fullmatch(answer) is not None


def _is_carrier(answer: Any) -> bool:
    return isinstance(answer, Mapping) and all(
        isinstance(name, str) and isinstance(value, str) for name, value in answer.items()
    )


def _takes_one(hook: str) -> bool:
    return len(inspect.signature(getattr(Observer, hook)).parameters) == 2  # its observer, and what it is about


def fan_out(observers: Iterable[Observer], soon: Soon | None = None) -> FanOut:
    """One observer that passes everything to all of `observers`; a program's that raises is logged once and dropped.

    If several answer a question, the first answer that is not empty counts.

    Args:
        soon: lets transactions wait for others (`Observer.transactions_settled`); None: each is passed on at once.

    Raises:
        TypeError: an observer's method is named almost like a hook: a typing mistake, and it would never be called.
    """
    observers = list(observers)
    for observer in observers:
        _check_names(type(observer))
    return FanOut(observers, soon)


def _check_names(kind: type) -> None:
    for base in kind.__mro__:
        if base is Observer or not issubclass(base, Observer):
            continue
        for name in vars(base):
            if name.startswith("_") or name in HOOKS:
                continue
            if meant := difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.85):
                raise TypeError(f"{base.__qualname__}.{name} is no hook of Observer: did you mean {meant[0]}?")
