"""Signals that arrive before their handlers exist.

The default of SIGHUP, SIGUSR1 and SIGUSR2 ends a process. Between the start of the program and its readiness that is
wrong for all three: an early reload must happen late, and not end the gateway. So the kernel holds them back until
there are handlers; one that came meanwhile is delivered then. SIGTERM and SIGINT are not held back: they may end a
process that does not serve yet.
"""

import signal
from typing import Final

HELD_BACK: Final = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
"""The signals that wait for their handlers."""


def hold_back() -> None:
    """Block the signals of `HELD_BACK`; call it before the process has other threads."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)


def let_through() -> None:
    """Unblock them, delivering any that have arrived; call it in the main thread, once there are handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
