"""What a message costs in counts, not in time: calls of our own functions, and system calls on sockets.

A machine's load changes every time that is measured on it, and none of these. Each bound is what was counted when it
was set, and a tenth more; whoever needs more says why, and raises it.
"""

import asyncio
import collections
import re
import smtplib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import otel_smtp
from otel_smtp.config import load
from otel_smtp.gateway import Gateway
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.process import gateway
from tests.support.tools import tool

PACKAGE = str(Path(otel_smtp.__file__).parent)
MESSAGES = 60
CONTENT = b"Subject: guarded\r\n\r\n" + b"x" * 76 + b"\r\n"


@pytest.fixture
def upstream() -> Iterator[CapturingUpstream]:
    with CapturingUpstream() as upstream:
        yield upstream


def send(port: int, count: int) -> None:
    with smtplib.SMTP("127.0.0.1", port) as client:
        for _ in range(count):
            client.sendmail("app@example.com", ["user@example.net"], CONTENT)


async def calls_of_a_message(settings: dict[str, Any]) -> tuple[float, collections.Counter[str]]:
    """How many functions of ours are called for one message on a kept connection, and which."""
    calls: collections.Counter[CodeType] = collections.Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[frame.f_code] += 1

    async with Gateway(load(values=settings)) as running:
        port = running.addresses["local"][0].port
        assert port is not None
        await asyncio.to_thread(send, port, 10)  # what is made once: connections, caches
        sys.setprofile(count)
        try:
            await asyncio.to_thread(send, port, MESSAGES)
        finally:
            sys.setprofile(None)
    named = collections.Counter({code.co_qualname: calls[code] for code in calls})
    return sum(calls.values()) / MESSAGES, named


@pytest.mark.parametrize(
    ("strategy", "is_traced", "most"),
    [("transparent", False, 680), ("transparent", True, 845), ("buffered", False, 615), ("buffered", True, 785)],
)
async def test_calls_of_a_message(
    strategy: str, is_traced: bool, most: int, upstream: CapturingUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OtlpReceiver(with_grpc=False) as receiver:
        if is_traced:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.http_endpoint)
            monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
            monkeypatch.setenv("OTEL_LOGS_EXPORTER", "none")
        else:
            monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
        counted, named = await calls_of_a_message(
            {
                "listener": [{"address": ["127.0.0.1:0"]}],
                "upstream": [{"url": upstream.url}],
                "delivery": {"strategy": strategy},
                "status": {"address": "off"},
            }
        )
    assert counted <= most, named.most_common(20)


def system_calls_of_a_message(settings: dict[str, Any], directory: Path) -> tuple[float, float]:
    """How many writes and reads of sockets one message costs on a kept connection; a read that finds nothing is one."""
    trace = directory / "trace"
    strace = [tool("strace"), "-f", "-qq", "-o", str(trace), "-e", "trace=sendto,sendmsg,recvfrom,recvmsg"]
    # asyncio's own loop writes and reads sockets by these calls alone.
    with gateway(settings, directory, under=strace, uses_uvloop=False, environ={"OTEL_SDK_DISABLED": "true"}) as made:
        send(made.port, MESSAGES)
    calls = collections.Counter(re.findall(r"^\d+ +(\w+)\(", trace.read_text(errors="replace"), re.MULTILINE))
    return (calls["sendto"] + calls["sendmsg"]) / MESSAGES, (calls["recvfrom"] + calls["recvmsg"]) / MESSAGES


@pytest.mark.parametrize(("strategy", "writes", "reads"), [("transparent", 6.7, 6.7), ("buffered", 5.7, 5.8)])
def test_system_calls_of_a_message(
    strategy: str, writes: float, reads: float, upstream: CapturingUpstream, tmp_path: Path
) -> None:
    settings = {"upstream.url": upstream.url, "delivery.strategy": strategy}
    found = []
    # On a busy machine a reply arrives in pieces and is read in pieces; what we cause is there each time.
    for attempt in ("first", "second", "third"):
        (tmp_path / attempt).mkdir()
        found.append(system_calls_of_a_message(settings, tmp_path / attempt))
        if found[-1][0] <= writes and found[-1][1] <= reads:
            return
    pytest.fail(f"writes and reads a message, bounds {writes} and {reads}: {found}")
