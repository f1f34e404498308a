"""Several observers as one, each kept from harming the others and the mail.

The dispatch of every hook is derived from `Observer`: a hook that is added there is dispatched from then on.
"""

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

from otel_smtp.observing.interface import HOOKS, Observer

logger: Final = logging.getLogger("otel_smtp.observing")


class _Member:
    """One observer, and whether it has raised."""

    __slots__ = ("observer", "raised")

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.raised = False

    def drop(self, hook: str) -> None:
        """Log the exception at hand, once, and drop the member."""
        if not self.raised:
            self.raised = True
            logger.exception(
                "observer raised and is dropped; mail is unaffected",
                extra={"observer": type(self.observer).__qualname__, "hook": hook},
            )


class FanOut(Observer):
    """See `fan_out`.

    Attributes:
        wants_transitions: somebody overrides `conn_state`, so that it has to be called.
    """

    def __init__(self, observers: Iterable[Observer]) -> None:
        members = [_Member(observer) for observer in observers]
        for hook, asks in HOOKS.items():
            listeners = tuple(
                (member, getattr(member.observer, hook)) for member in members if _overrides(member.observer, hook)
            )
            if hook == "conn_state":
                self.wants_transitions = bool(listeners)
            # Bound to those who listen, so that a call has nothing to look up; of those who do not, the interface's.
            if listeners:
                setattr(self, hook, (_asker if asks else _teller)(hook, listeners))


_Listeners = tuple[tuple[_Member, Callable[..., Any]], ...]


def _overrides(observer: Observer, hook: str) -> bool:
    return getattr(type(observer), hook) is not getattr(Observer, hook) or hook in getattr(observer, "__dict__", ())


def _teller(hook: str, listeners: _Listeners) -> Callable[..., None]:
    def tell(*about: Any) -> None:
        for member, method in listeners:
            if not member.raised:
                try:
                    method(*about)
                except Exception:  # noqa: BLE001 - telemetry never touches mail
                    member.drop(hook)

    def tell_one(record: Any) -> None:
        """The same of one argument, as nearly all hooks have: several times a mail."""
        for member, method in listeners:
            if not member.raised:
                try:
                    method(record)
                except Exception:  # noqa: BLE001 - as above
                    member.drop(hook)

    return tell_one if _takes_one(hook) else tell


def _asker(hook: str, listeners: _Listeners) -> Callable[..., Any]:
    no_answer = getattr(Observer(), hook)(None)  # what the interface itself says

    def ask(record: Any) -> Any:
        for member, method in listeners:
            if not member.raised:
                try:
                    answer = method(record)
                except Exception:  # noqa: BLE001 - telemetry never touches mail
                    member.drop(hook)
                    continue
                if answer:
                    return answer
        return no_answer

    return ask


def _takes_one(hook: str) -> bool:
    return len(inspect.signature(getattr(Observer, hook)).parameters) == 2  # its observer, and what it is about


def fan_out(observers: Iterable[Observer]) -> FanOut:
    """One observer that tells all of `observers`; one that raises is logged once and dropped.

    Where several could answer a question, the first answer that is not empty holds.

    Raises:
        TypeError: a method of an observer is named almost like a hook and is none, so it would never be called.
    """
    observers = list(observers)
    for observer in observers:
        _check_names(type(observer))
    return FanOut(observers)


def _check_names(kind: type) -> None:
    for base in kind.__mro__:
        if base is Observer or not issubclass(base, Observer):
            continue
        for name in vars(base):
            if name.startswith("_") or name in HOOKS:
                continue
            if meant := difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.85):
                raise TypeError(f"{base.__qualname__}.{name} is no hook of Observer: did you mean {meant[0]}?")
