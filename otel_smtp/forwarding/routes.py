"""Routes: the upstreams that serve a mail, by patterns of senders and recipients, in order of preference."""

import re
from collections.abc import Sequence
from itertools import count
from typing import Generic, Protocol, TypeVar

from otel_smtp.smtp.envelope import Mail, Recipient


class Routed(Protocol):
    """An upstream with patterns."""

    @property
    def senders(self) -> tuple[str, ...]:
        """Patterns of reverse-paths; none: all."""
        ...

    @property
    def recipients(self) -> tuple[str, ...]:
        """Patterns of recipients; none: all."""
        ...


T = TypeVar("T")


class _Row(Generic[T]):
    __slots__ = ("recipients", "senders", "upstream")

    def __init__(self, settings: Routed, upstream: T) -> None:
        self.senders = _pattern(settings.senders)
        self.recipients = _pattern(settings.recipients)
        self.upstream = upstream


class Serving(Generic[T]):
    """The upstreams that serve one sender.

    Attributes:
        upstreams: all of them, the preferred one first.
        for_all: those that serve every recipient; empty if that depends on the recipient.
    """

    __slots__ = ("_rows", "for_all", "upstreams")

    def __init__(self, rows: "Sequence[_Row[T]]") -> None:
        self._rows = rows
        self.upstreams: Sequence[T] = [row.upstream for row in rows]
        self.for_all: Sequence[T] = () if any(row.recipients is not None for row in rows) else self.upstreams

    def for_recipient(self, recipient: Recipient) -> Sequence[T]:
        """Those that serve a recipient too, the preferred one first."""
        if self.for_all:
            return self.for_all
        return [row.upstream for row in self._rows if row.recipients is None or row.recipients.match(recipient.address)]


class _Everything:
    """Patterns that match every mail."""

    senders: tuple[str, ...] = ()
    recipients: tuple[str, ...] = ()


def whatever_they_serve(upstreams: Sequence[T]) -> Serving[T]:
    """A route along `upstreams`, the preferred one first, for any sender and recipient."""
    return Serving([_Row(_Everything(), upstream) for upstream in upstreams])


class Routes(Generic[T]):
    """The routes to a list of upstreams.

    Args:
        upstreams: with their patterns, the preferred one first. `*` stands for anything, `?` for one character; case
            does not matter; the null reverse-path is matched by "" and by "*".

    Attributes:
        for_all: the upstreams for every sender; None if that depends on the sender.
        preferred: the upstreams that come first for some mail.
    """

    __slots__ = ("_rows", "for_all", "preferred")

    def __init__(self, upstreams: Sequence[tuple[Routed, T]]) -> None:
        self._rows = [_Row(settings, upstream) for settings, upstream in upstreams]
        has_patterns = any(row.senders is not None for row in self._rows)
        self.for_all = None if has_patterns else Serving(self._rows)
        catch_all = (
            number for number, row in enumerate(self._rows, 1) if row.senders is None and row.recipients is None
        )
        self.preferred: Sequence[T] = [row.upstream for row in self._rows[: next(catch_all, None)]]

    def for_mail(self, mail: Mail) -> Serving[T]:
        """The upstreams that serve the sender."""
        if self.for_all is not None:
            return self.for_all
        return Serving([row for row in self._rows if row.senders is None or row.senders.match(mail.reverse_path)])


def _pattern(patterns: Sequence[str]) -> re.Pattern[str] | None:
    """One expression for all `patterns`; None without any."""
    if not patterns:
        return None
    numbers = count()
    return re.compile("|".join(_translated(pattern, numbers) for pattern in patterns), re.IGNORECASE | re.DOTALL)


def _translated(pattern: str, numbers: "count[int]") -> str:
    """`pattern` as a regular expression that takes linear time, however many `*` it has.

    The first match of the text between two `*` is as good as any later one, so none is tried twice. A lookahead whose
    group is then repeated expresses this; `fnmatch.translate` uses an atomic group, which this package avoids (see
    `otel_smtp.smtp.paths`).

    Args:
        numbers: name the groups, which must be unique in the whole expression.
    """
    first, *others = ("".join("." if sign == "?" else re.escape(sign) for sign in part) for part in pattern.split("*"))
    if not others:
        return rf"{first}\Z"
    *between, last = others
    steps = (f"(?=(?P<to{number}>.*?{part}))(?P=to{number})" for number, part in zip(numbers, between, strict=False))
    return rf"{first}{''.join(steps)}.*{last}\Z"
