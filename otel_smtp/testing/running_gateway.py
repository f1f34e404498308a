"""A gateway and its mailbox, running in a thread of their own."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.message import Message
from typing import Any, Final, NamedTuple

from otel_smtp import Gateway, load
from otel_smtp.testing.mailbox import Mailbox
from otel_smtp.testing.mailbox_server import MailboxServer
from otel_smtp.testing.traces import TRANSACTION, WAIT_SECONDS, Recorder, Span, Told, Trace, find_transaction

_HOST: Final = "127.0.0.1"
# Only an overloaded machine comes near these: a start takes a few milliseconds, after a first import of 0.3 s.
START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
# Only one gateway is made at a time: see `_without_otel_variables`.
_making: Final = threading.Lock()


class RunningGateway:
    """A gateway under test, its mailbox and its traces; made by `run_gateway`.

    Attributes:
        host, port: where it takes mail.
        mailbox: where the mail goes.
    """

    def __init__(self, port: int, mailbox: Mailbox, recorder: Recorder) -> None:
        self.host = _HOST
        self.port = port
        self.mailbox = mailbox
        self._recorder = recorder

    @property
    def url(self) -> str:
        """Its address as `smtp://host:port`."""
        return f"smtp://{self.host}:{self.port}"

    @property
    def spans(self) -> list[Span]:
        """All finished spans of the gateway, in the order of their ends."""
        return self._recorder.spans

    @property
    def traces(self) -> list[Trace]:
        """The traces of all finished transactions, refused ones too, in the order of their ends."""
        return [Trace(self._recorder, span) for span in self.spans if span.name == TRANSACTION]

    def trace_of(self, message: Told, *, timeout_seconds: float = WAIT_SECONDS) -> Trace:
        """The trace of a message, once its transaction is over.

        Args:
            message: from the mailbox, or as the application sent it (found by its traceparent or Message-ID); a trace
                id; or a reply, or the exception of a client library, in whose words `trace=…` stands.

        Raises:
            TimeoutError: no such transaction ended in time.
            TypeError: `message` is nothing of the kind; Django's messages, say, are given as `message.message()`.
        """
        if not isinstance(message, Message | str | bytes | BaseException):
            raise TypeError(f"no message, reply, trace id or exception: {message!r}")
        found = self._recorder.wait_for(
            lambda spans: find_transaction(spans, message), timeout_seconds, "the trace of the message"
        )
        return Trace(self._recorder, found)


@contextlib.contextmanager
def run_gateway(settings: Mapping[str, object] | None = None) -> Iterator[RunningGateway]:
    """Run a gateway on a port that the kernel chooses, with a mailbox as its upstream.

    Args:
        settings: as in the gateway's TOML file, merged over this module's defaults, lists of tables by position.

    It exports nothing, and ignores the environment's `OTEL_*` variables.

    Raises:
        otel_smtp.config.SettingsError: with everything that is wrong about the settings.
        OSError: no port is free.
        TimeoutError: it did not start or stop in time.
    """
    started: Future[_Started] = Future()
    with ThreadPoolExecutor(1, "otel-smtp-testing") as executor:
        ended = executor.submit(lambda: asyncio.run(_serve(settings or {}, started)))
        either: list[Future[Any]] = [started, ended]
        wait(either, START_SECONDS, FIRST_COMPLETED)
        if ended.done():
            ended.result()
        running, stop = started.result(timeout=0)
        try:
            yield running
        finally:
            stop()
            ended.result(STOP_SECONDS)


class _Started(NamedTuple):
    running: RunningGateway
    stop: Callable[[], object]


async def _serve(settings: Mapping[str, object], started: "Future[_Started]") -> None:
    """Serve until stopped."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    mailbox, recorder = Mailbox(), Recorder()
    upstream = await loop.create_server(lambda: MailboxServer(mailbox), _HOST, 0)
    try:
        wanted = load(values=_merged(_defaults(upstream.sockets[0].getsockname()[1]), settings))
        with _making, _without_otel_variables():
            gateway = Gateway(wanted, span_sinks=[recorder])
        await gateway.start()
        try:
            port = next(iter(gateway.addresses.values()))[0].port
            assert port is not None
            running = RunningGateway(port, mailbox, recorder)
            started.set_result(_Started(running, lambda: loop.call_soon_threadsafe(stopping.set)))
            await stopping.wait()
        finally:
            await gateway.stop(immediately=True)
    finally:
        upstream.close()


def _defaults(upstream_port: int) -> dict[str, object]:
    return {
        "hostname": "gateway.test",
        "listener": [{"address": [f"{_HOST}:0"]}],
        "upstream": [{"name": "mailbox", "url": f"smtp://{_HOST}:{upstream_port}"}],
        "status": {"address": "off"},
        "telemetry": {"message_id": True},
    }


def _merged(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Merge two trees of settings, key by key; `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(under, value)
        elif isinstance(under, list) and isinstance(value, list):
            both = [_merged(one, other) for one, other in zip(under, value, strict=False)]
            merged[key] = [*both, *under[len(value) :], *value[len(under) :]]
        else:
            merged[key] = value
    return merged


@contextlib.contextmanager
def _without_otel_variables() -> Iterator[None]:
    """Hide `OTEL_*` variables while the gateway is made, which is when it reads them.

    They are the application's: its tests often run with OTEL_SDK_DISABLED=true, which would leave no traces, or with an
    endpoint that does not exist.
    """
    hidden = {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
