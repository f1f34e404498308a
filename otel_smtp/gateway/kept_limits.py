"""Limits that survive a restart, for a gateway with its queue in a directory.

Their use is written to a file there: soon after permits were taken, at once after many, and when the gateway stops.
Permits that a killed process may have taken since count as used: a limit is never exceeded to make up for a failure.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from otel_smtp.forwarding.limits import Limit, LimitSettings, LimitState, Permit
from otel_smtp.spool.embedded.files import open_regular

SAVE_SECONDS: Final = 1.0
"""The delay between a permit's being taken, or landing, and writing it."""
UNSAVED_PART: Final = 0.01
"""Of a limit, may be taken without that it is written: what a kill costs at most, where little is taken in a second."""

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

logger: Final = logging.getLogger("otel_smtp.gateway.kept_limits")


class _Kept(msgspec.Struct, frozen=True):
    count: int
    period_seconds: float
    per_recipient: bool
    state: LimitState


class _File(msgspec.Struct, frozen=True):
    """Attributes:
    boot: of the machine; within it the monotonic clock tells how long ago this was; otherwise only the wall clock does.
    monotonic, wall: when this was.
    is_final: nothing was taken after it.
    """

    boot: str
    monotonic: float
    wall: float
    is_final: bool
    limits: dict[str, _Kept]


class KeptLimits:
    """The limits of one gateway, by name.

    Args:
        path: of the file; `open` reads it, once the directory is ours.
    """

    def __init__(
        self,
        settings: Sequence[LimitSettings],
        path: Path,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.limits = {one.name: _KeptLimit(one, self._changed, self.save) for one in settings}
        self._path = path
        self._monotonic = monotonic
        self._wall = wall
        self._is_open = False
        self._has_failed = False
        self._saving: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Continue from the state of the previous process."""
        self._is_open = True
        try:
            with open(open_regular(self._path, os.O_RDONLY), "rb") as file:
                kept = msgspec.json.decode(file.read(), type=_File)
        except FileNotFoundError:
            kept = None
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("use of limits unknown, they count from now", extra={"reason": str(error)})
            kept = None
        if kept is not None:
            now = self._monotonic()
            is_same_boot = kept.boot == _boot_id() != ""
            elapsed = max(0.0, now - kept.monotonic if is_same_boot else self._wall() - kept.wall)
            for name, one in self.limits.items():
                if (of_name := kept.limits.get(name)) is not None and of_name == _kept(one, of_name.state):
                    one.resume(of_name.state, elapsed, 0 if kept.is_final else one.most_unsaved - 1, now)
        self.save()

    def close(self) -> None:
        """Write them for the last time: no more permits will be taken, and the directory is still ours."""
        if self._saving is not None:
            self._saving.cancel()
        if self._is_open:
            self._is_open = False
            self._save(is_final=True)

    def _changed(self) -> None:
        if self._saving is None and self._is_open:
            self._saving = asyncio.get_running_loop().call_later(SAVE_SECONDS, self.save)

    def save(self) -> None:
        """Write the use of the limits."""
        if self._saving is not None:
            self._saving.cancel()
            self._saving = None
        if self._is_open:
            self._save(is_final=False)

    def _save(self, *, is_final: bool) -> None:
        now = self._monotonic()
        limits = {name: _kept(one, one.state(now)) for name, one in self.limits.items()}
        for one in self.limits.values():
            one.unsaved = 0
        data = msgspec.json.encode(_File(_boot_id(), now, self._wall(), is_final, limits))
        new = self._path.with_name(self._path.name + ".new")
        try:
            with open(open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                file.write(data)
            new.replace(self._path)
        except OSError as error:
            if not self._has_failed:
                logger.warning("use of limits cannot be kept", extra={"reason": str(error)})
            self._has_failed = True
        else:
            self._has_failed = False


class _KeptLimit(Limit):
    """A limit whose use is saved.

    Args:
        changed: called when it must be written soon. `save`: writes it.

    Attributes:
        unsaved: permits taken since it was last written; below `most_unsaved` whenever mail is sent.
    """

    def __init__(self, settings: LimitSettings, changed: Callable[[], None], save: Callable[[], None]) -> None:
        super().__init__(settings)
        self._changed = changed
        self._save = save
        self.unsaved = 0
        a_while = math.ceil(SAVE_SECONDS * settings.count / settings.period_seconds)
        self.most_unsaved = max(a_while, int(settings.count * UNSAVED_PART), 1)

    def take(self, amount: int, now: float) -> Permit | float:
        taken = super().take(amount, now)
        if isinstance(taken, Permit):
            self.unsaved += amount
            if self.unsaved >= self.most_unsaved:
                self._save()
            else:
                self._changed()
        return taken

    def landed(self, permit: Permit, now: float) -> None:
        super().landed(permit, now)
        self._changed()

    def rest(self, seconds: float, now: float) -> None:
        super().rest(seconds, now)
        self._changed()


def _kept(limit: Limit, state: LimitState) -> _Kept:
    settings = limit.settings
    return _Kept(settings.count, settings.period_seconds, settings.per_recipient, state)


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
