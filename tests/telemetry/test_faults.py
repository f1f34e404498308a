"""A fault in any function of telemetry: each in turn raises at every call, while mail is observed.

What is raised reaches neither who observes mail nor who logs, and is told a few times, not for each mail.
"""

import importlib
import inspect
import io
import logging
import pkgutil
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType

import pytest

import otel_smtp.telemetry
from otel_smtp.observing import ConnectionInfo, Observer, Outcome, StateCallback, TransactionRecord, fan_out, interface
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail
from otel_smtp.smtp.states import Transition
from otel_smtp.status import live, traces
from otel_smtp.telemetry.keeping import Keep, Keeping
from otel_smtp.telemetry.logs import ROOT, JsonLines, LineHandler, TextLines
from otel_smtp.telemetry.setup import Telemetry, TelemetryOptions, set_up
from otel_smtp.telemetry.state_events import StateEvents
from tests.support.ports import unclaimed_port
from tests.telemetry.driving import QUEUED, Client, begin_delivery, finish_delivery

LINES = 8  # fewer than there are mails and attempts
# What keeps the faults of all others from harm, or does nothing.
GUARDS = frozenset({"SafeHandler.handle", "SafeHandler.handleError"})

# What a function gives when it is called: an object that runs later, or what it returns.
KINDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def functions() -> Iterator[FunctionType]:
    """All functions, methods and properties of telemetry, and of what else observes."""
    names = [module.name for module in pkgutil.iter_modules(otel_smtp.telemetry.__path__, "otel_smtp.telemetry.")]
    for module in [*map(importlib.import_module, names), interface, live, traces]:
        for value in vars(module).values():
            if getattr(value, "__module__", None) != module.__name__:
                continue
            for one in vars(value).values() if inspect.isclass(value) else (value,):
                function = getattr(one, "fget", None) or getattr(one, "__func__", None) or one
                is_ours = isinstance(function, FunctionType) and function.__module__ == module.__name__
                if is_ours and function.__qualname__ not in GUARDS:
                    yield function


def raising(code: CodeType) -> CodeType:
    """What raises in place of `code`: to take a function's code reaches all who hold the function.

    It has to be of the same kind, and to have the same variables of the functions around it.
    """
    free = code.co_freevars
    is_async = code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
    yields = code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR)
    lines = [
        "def outer():",
        *(f"    {name} = None" for name in free),
        f"    {'async ' if is_async else ''}def broken(*_, **__):",
        "        raise RuntimeError('a fault')",
        *(["        yield"] if yields else []),
        f"        return {', '.join(free) or None}",
        "    return broken",
    ]
    namespace: dict[str, Callable[[], FunctionType]] = {}
    exec("\n".join(lines), namespace)  # the names of variables
    broken = namespace["outer"]().__code__
    assert broken.co_freevars == free
    assert broken.co_flags & KINDS == code.co_flags & KINDS
    return broken


def mails(observer: Observer) -> None:
    """Mail that goes well and mail that does not, on connections of all kinds, and from the spool."""
    client = Client(observer, segment_events=20).ehlo().starttls().ehlo().auth()
    client.message().message().message(f"00-{'a' * 32}-{'b' * 16}-01")
    client.mail().rcpt().rcpt("none@example.net", replies.STORAGE_FULL).data().header()
    client.deliver(QUEUED)
    client.final()
    client.mail().rcpt().data().header()
    client.deliver(replies.STORAGE_FULL, Outcome.DEFERRED)
    client.final(replies.STORAGE_FULL, Outcome.DEFERRED)
    client.refused("VRFY", replies.OUTCOME_UNKNOWN).mail().rcpt().rset()
    observer.connection_carrier(client.record)
    client.quit()
    Client(observer).close()
    Client(observer, peer="127.0.0.1").ehlo().mail().rcpt().data().header().close()
    observer.connection_refused("capacity")
    spooled = TransactionRecord.resumed("01J9ZQ4T3M", {}, Mail("news@example.com"), attempt=2)
    observer.carrier(spooled)
    finish_delivery(observer, begin_delivery(spooled))


def heard(info: ConnectionInfo, transition: Transition) -> None:
    """A program's own callback."""


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    """All of it, exporting to nobody, and not before the end."""
    options = TelemetryOptions(
        state_events=StateEvents.SPAN,
        memories=[traces.RecentTraces().add],
        keeping=Keeping([Keep.ERRORS, Keep.SLOW], slow_seconds=5.0, per_second=20.0),
        with_message_id=True,
    )
    seldom = dict.fromkeys(
        ("OTEL_BSP_SCHEDULE_DELAY", "OTEL_BLRP_SCHEDULE_DELAY", "OTEL_METRIC_EXPORT_INTERVAL"), "3600000"
    )
    made = set_up(options, {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{unclaimed_port()}", **seldom})
    made.start()
    yield made
    made.flush_and_shutdown(0.1)


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """The log, without those who listen to it in tests: they would have records made of all lines."""
    logger = logging.getLogger(ROOT)
    before = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.INFO)
    yield logger
    logger.propagate, logger.level = before


@pytest.mark.parametrize(
    "make_handler", [JsonLines, lambda stream: TextLines(stream, colors=False)], ids=["json", "text"]
)
def test_no_function_of_telemetry_can_harm_who_observes_or_logs(
    make_handler: Callable[[io.StringIO], LineHandler],
    telemetry: Telemetry,
    log: logging.Logger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unharmed = 0
    for function in functions():
        told = io.StringIO()
        handler = make_handler(told)
        view = live.LiveView(shown_host=str, shown_name=str)
        observer = fan_out([*telemetry.observers, view, StateCallback(heard)])
        code = function.__code__
        broken = raising(code)
        log.addHandler(handler)
        try:
            function.__code__ = broken
            mails(observer)
            logging.getLogger("otel_smtp.server").warning("something else")
        except Exception as error:
            raise AssertionError(f"{function.__module__}.{function.__qualname__} harms mail") from error
        finally:
            function.__code__ = code
            log.removeHandler(handler)
        faults = told.getvalue().count("a fault")
        assert faults < LINES, f"{function.__qualname__} is told {faults} times"
        unharmed += 1
    assert unharmed > 400
    assert capsys.readouterr() == ("", "")
