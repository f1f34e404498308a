"""Several observers as one, each kept from harming the others and the mail.

The dispatch of every hook is derived from `Observer`: a hook that is added there is dispatched from then on.
"""

import difflib
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
        self._listeners: dict[str, tuple[tuple[_Member, Callable[..., Any]], ...]] = {
            hook: tuple(
                (member, getattr(member.observer, hook)) for member in members if _overrides(member.observer, hook)
            )
            for hook in HOOKS
        }
        self.wants_transitions = bool(self._listeners["conn_state"])


def _overrides(observer: Observer, hook: str) -> bool:
    return getattr(type(observer), hook) is not getattr(Observer, hook) or hook in getattr(observer, "__dict__", ())


def _teller(hook: str) -> Callable[..., None]:
    def tell(self: FanOut, *args: Any) -> None:
        for member, method in self._listeners[hook]:
            if not member.raised:
                try:
                    method(*args)
                except Exception:  # noqa: BLE001 - telemetry never touches mail
                    member.drop(hook)

    return tell


def _asker(hook: str) -> Callable[..., Any]:
    no_answer = getattr(Observer(), hook)(None)  # what the interface itself says

    def ask(self: FanOut, *args: Any) -> Any:
        for member, method in self._listeners[hook]:
            if not member.raised:
                try:
                    answer = method(*args)
                except Exception:  # noqa: BLE001 - telemetry never touches mail
                    member.drop(hook)
                    continue
                if answer:
                    return answer
        return no_answer

    return ask


for _hook, _asks in HOOKS.items():
    setattr(FanOut, _hook, (_asker if _asks else _teller)(_hook))


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
