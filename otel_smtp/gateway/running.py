"""Running a gateway as a process: signals, the service manager, the event loop, and one or several workers."""

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from otel_smtp.config import Settings
from otel_smtp.forwarding.ceiling import SharedCeilings
from otel_smtp.forwarding.limits import SharedLimits
from otel_smtp.forwarding.slots import SharedSlots
from otel_smtp.gateway import wiring
from otel_smtp.gateway.gateway import WRONG_FILES, Gateway, Ready
from otel_smtp.gateway.ports import SharedPorts, with_present_addresses
from otel_smtp.gateway.reloading import ReadSettings, Reloading
from otel_smtp.gateway.signals import let_through
from otel_smtp.gateway.status_port import Process
from otel_smtp.gateway.systemd import ServiceManager
from otel_smtp.gateway.workers import AT_ONCE, REPLACED, Supervisor
from otel_smtp.net import is_accept_exhausted
from otel_smtp.telemetry import environment
from otel_smtp.telemetry.logs import set_log_level

logger: Final = logging.getLogger("otel_smtp.gateway.running")

# When descriptors ran out, asyncio alone wrote over a thousand tracebacks in five seconds.
EXHAUSTION_LOG_SECONDS: Final = 10.0

FAILED: Final = 1
WRONG: Final = 2
# Objects that are new beyond those that are gone: then the garbage collector looks at the young ones. A connection has
# some ten for each mail until its segment ends, and the segments of busy connections that came together end together:
# ten of them have some twelve thousand by then, none of which is garbage.
YOUNG_OBJECTS: Final = 20_000

OnReady = Callable[[Ready], None]


def run(settings: Settings, *, on_ready: OnReady, read_settings: ReadSettings) -> int:
    """Run the gateway, on uvloop where it is installed, in as many processes as the settings say.

    Args:
        on_ready: called when it serves.
        read_settings: reads the settings again, on SIGHUP.

    Returns:
        The exit status: 0 after a drain, 1 if it could not start, 2 if a file it reads is wrong.
    """
    for problem in environment.read().problems:  # here, once for all workers
        logger.warning(
            "telemetry variable cannot be used",
            extra={"variable": problem.variable, "value": problem.value, "allowed": problem.allowed},
        )
    if settings.workers == 1:
        return _exit_status(lambda: _run_here(serve(settings, on_ready, read_settings=read_settings)))
    return _exit_status(lambda: _supervise(settings, on_ready, read_settings))


def _exit_status(running: Callable[[], int]) -> int:
    try:
        return running()
    except WRONG_FILES as error:
        logger.error("cannot start: %s", error)
        return WRONG
    except Exception as error:
        from otel_smtp.spool.messages import SpoolError  # late: most gateways have no spool

        if not isinstance(error, OSError | SpoolError):
            raise
        logger.error("cannot start: %s", error)
        return FAILED


def _run_here(serving: Coroutine[Any, Any, None]) -> int:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serving)
    return 0


def _supervise(settings: Settings, on_ready: OnReady, read_settings: ReadSettings) -> int:
    leave_out_of_garbage_collection()
    traces_to = environment.read().describe_traces()
    token = secrets.token_hex()
    ceilings = SharedCeilings([upstream.name for upstream in settings.upstream], settings.workers)
    limits = SharedLimits(wiring.limit_settings(settings))
    slots = SharedSlots(wiring.slot_settings(settings))
    with SharedPorts(with_present_addresses(settings)) as shared:
        # For workers that are forked later.
        reloading = Reloading(settings, read_settings, shared.adopt)
        manager = ServiceManager(os.environ.get("NOTIFY_SOCKET"))

        def work(number: int, announce: Callable[[], None]) -> int:
            sockets = shared.claim(number)
            process = Process(number, shared.worker_status_ports, token, sockets, ceilings, limits, slots)
            serving = serve(
                shared.settings,
                lambda _: announce(),
                read_settings=read_settings,
                read_before=reloading.settings,
                process=process,
                at_once=AT_ONCE,
                replaced=REPLACED,
            )
            return _exit_status(lambda: _run_here(serving))

        def announce_all() -> None:
            on_ready(ready)
            manager.ready()

        addresses = {listener.name: listener.address for listener in shared.settings.listener}
        ready = Ready(shared.settings, addresses, traces_to, shared.settings.status.address)
        return Supervisor(
            settings.workers,
            work,
            on_ready=announce_all,
            on_reload=partial(manager.through_reload, reloading.again),
            on_unserved=shared.stop_listening,
            on_stop=shared.close_listeners,
            grace_seconds=settings.timeouts.shutdown_grace,
        ).run()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def serve(
    settings: Settings,
    on_ready: OnReady,
    *,
    read_settings: ReadSettings,
    read_before: Settings | None = None,
    process: Process | None = None,
    at_once: signal.Signals | None = None,
    replaced: signal.Signals | None = None,
) -> None:
    """Run a gateway until SIGTERM or SIGINT, and its drain. SIGHUP reads settings, certificates and users again.

    Args:
        on_ready: called when the gateway serves.
        read_settings: reads the settings again.
        read_before: its result from which `settings` were adapted; None: they were not adapted.
        process: this one among the processes that listen on the same ports.
        at_once: the signal that cuts the drain short; None: a second SIGTERM or SIGINT.
        replaced: the signal that begins the drain of a process whose successor serves, if any.

    Raises:
        CannotListen: an address cannot be listened at.
    """
    gateway = Gateway(settings, process=process)
    loop = asyncio.get_running_loop()
    asked = _Asked(at_once=at_once, replaced=replaced)
    # Before the first client: mail that is accepted while the rest starts gets its drain too.
    await gateway.start(before_listening=partial(asked.hear, loop))
    leave_out_of_garbage_collection()
    loop.set_exception_handler(_LoopFaults())
    # With workers, their parent notifies the service manager.
    manager = ServiceManager(os.environ.get("NOTIFY_SOCKET") if process is None else None)

    def apply(new: Settings) -> None:
        gateway.reload(new)
        set_log_level(new.log.level)
        gateway.heed_log_level()

    reloading = Reloading(read_before or settings, read_settings, apply, is_silent=process is not None)
    gateway.told_of_reloads = partial(reloading.told, os.getpid() if process is None else os.getppid())
    loop.add_signal_handler(signal.SIGHUP, manager.through_reload, reloading.again)
    let_through()
    on_ready(gateway.ready)
    manager.ready()
    await asked.to_drain.wait()
    manager.stopping(settings.timeouts.shutdown_grace)
    logger.info("draining", extra={"grace_seconds": settings.timeouts.shutdown_grace})
    drain = loop.create_task(_drain(gateway, has_successor=asked.has_successor))
    stop_now = loop.create_task(asked.to_stop_now.wait())
    await asyncio.wait({drain, stop_now}, return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        logger.warning("second signal received, stopping now")
        drain.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drain
        await gateway.stop(immediately=True)
    stop_now.cancel()
    if not drain.cancelled():
        drain.result()  # a failed drain is not a drain


async def _drain(gateway: Gateway, *, has_successor: bool) -> None:
    if has_successor:
        await gateway.leave_ports()  # first: health checks and new clients want the gateway, not this process
    await gateway.stop()


class _Asked:
    """The requests made by signals.

    Args:
        at_once, replaced: see `serve`.
    """

    def __init__(self, *, at_once: signal.Signals | None, replaced: signal.Signals | None) -> None:
        self.to_drain = asyncio.Event()
        self.to_stop_now = asyncio.Event()
        self.has_successor = False
        self._at_once = at_once
        self._replaced = replaced

    def hear(self, loop: asyncio.AbstractEventLoop) -> None:
        """Handle signals from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        # By default they end the process without a drain.
        for number in {signal.SIGUSR1, signal.SIGUSR2} - {self._at_once, self._replaced}:
            loop.add_signal_handler(number, _ignored, number)
        if self._at_once is not None:
            loop.add_signal_handler(self._at_once, self._stop_now)
        if self._replaced is not None:
            loop.add_signal_handler(self._replaced, self._leave_to_successor)

    def _stop(self) -> None:
        if self.to_drain.is_set() and self._at_once is None:
            self.to_stop_now.set()
        self.to_drain.set()

    def _stop_now(self) -> None:
        self.to_drain.set()
        self.to_stop_now.set()

    def _leave_to_successor(self) -> None:
        self.has_successor = True
        self.to_drain.set()


def _ignored(number: signal.Signals) -> None:
    logger.warning("signal ignored", extra={"signal": number.name})


def leave_out_of_garbage_collection() -> None:
    """Exclude the objects made at start-up from cyclic garbage collection, and enable it.

    Some hundred thousand of them live as long as the process: a collection that visits them stops all mail for 37 ms,
    one without them for 4. There is no last collection before, since the first client may be waiting for its greeting.
    A mail's objects are freed at its end, without a collection. By Python's own threshold of 700 objects one looks
    at the mails under way again and again, which with fifty of them in the queue is a twentieth of what a mail costs.

    For a process that is a gateway and nothing else: a program that embeds one decides for itself.
    """
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    gc.enable()


class _LoopFaults:
    """The event loop's exception handler. Running out of descriptors is logged now and then, not in a flood.

    The loop retries after a second, and clients wait in the kernel's queue meanwhile.
    """

    def __init__(self) -> None:
        self._quiet_until = 0.0
        self._count = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not is_accept_exhausted(context):
            loop.default_exception_handler(context)
            return
        self._count += 1
        if loop.time() >= self._quiet_until:
            logger.error("no file descriptors left to accept connections", extra={"times": self._count})
            self._quiet_until = loop.time() + EXHAUSTION_LOG_SECONDS
            self._count = 0
