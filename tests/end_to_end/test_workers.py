"""Several processes on one port, supervised."""

import contextlib
import functools
import json
import os
import re
import signal
import smtplib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from tests.durability.supervising import storm
from tests.end_to_end.conftest import Client, StartGateway
from tests.end_to_end.test_traces import exporting
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.ports import unclaimed_port
from tests.support.process import USES_UVLOOP, GatewayProcess, listening_sockets, settings_file, until
from tests.support.tools import tool

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def send(port: int) -> None:
    with smtplib.SMTP("127.0.0.1", port, timeout=15) as client:
        client.sendmail("a@client.example", ["b@there.example"], "Subject: x\r\n\r\nHello\r\n")


def two_workers(upstream: CapturingUpstream, start: StartGateway, *, uses_uvloop: bool = USES_UVLOOP) -> GatewayProcess:
    running = start({"upstream.url": upstream.url, "workers": 2}, uses_uvloop=uses_uvloop)
    assert len(running.children) == 2
    return running


def test_workers_share_the_port_and_drain_together(
    upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    running = two_workers(upstream, start)
    for _ in range(20):
        send(running.port)
    assert len(upstream.messages) == 20
    clients = [connect(running.port) for _ in range(8)]
    for client in clients:
        client.opens_content()
    running.signal(signal.SIGTERM)
    for client in clients:
        assert client.asks("Subject: y\r\n\r\n.").startswith("250 ")
        assert client.reply().startswith("421 4.3.2 ")
    assert running.wait() == 0
    assert len(upstream.messages) == 28


class Clocked(list[Any]):
    """What an upstream got, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def append(self, message: Any) -> None:
        self.times.append(time.monotonic())
        super().append(message)


@pytest.mark.long
def test_workers_keep_a_rate_together(upstream: CapturingUpstream, start: StartGateway) -> None:
    upstream.messages = clocked = Clocked()
    limited = {"upstream.url": upstream.url, "upstream.limits": ["rate"], "limit.name": "rate", "limit.rate": "6/s"}
    running = start({**limited, "limit.burst": 3, "workers": 2})
    with ThreadPoolExecutor(8) as clients:
        for sending in [clients.submit(send, running.port) for _ in range(20)]:
            sending.result(timeout=30)
    assert len(clocked) == 20
    times = clocked.times
    assert max(sum(1 for other in times[index:] if other < at + 1.0) for index, at in enumerate(times)) <= 6
    assert times[-1] - times[0] < 8


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_every_worker_exports_its_own_traces(
    protocol: str, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    named = {**exporting(receiver, protocol), "OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=gateway-7"}
    running = start({"upstream.url": upstream.url, "workers": 2}, named)
    workers = {str(pid) for pid in running.children}
    for _ in range(20):
        send(running.port)
    assert running.stop() == 0
    spans = receiver.spans
    # Ids are random; processes that were forked must not draw the same.
    assert len({span.span_id for span in spans}) == len(spans) == 60
    assert len({span.trace_id for span in spans}) == 20
    # Each exports metrics, whether it has relayed any mail or not: two processes of one id would be one to a backend,
    # and its counters would jump to and fro.
    exported = {(one.resource["service.instance.id"], str(one.resource["process.pid"])) for one in receiver.metrics}
    assert {pid for _, pid in exported} == workers
    assert {instance for instance, _ in exported} == {"gateway-7-0", "gateway-7-1"}
    assert len(exported) == 2
    by_process = {str(span.resource["process.pid"]): span.resource["service.instance.id"] for span in spans}
    assert {(instance, pid) for pid, instance in by_process.items()} <= exported


@pytest.mark.parametrize("workers", [1, 2])
def test_variables_that_cannot_be_used_stop_no_mail_and_are_named_once(
    workers: int, upstream: CapturingUpstream, start: StartGateway
) -> None:
    wrong = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "weekly",
        "OTEL_TRACES_SAMPLER": "parentbased_jaeger_remote",
        "OTEL_TRACES_EXPORTER": "zipkin",
        "OTEL_SDK_DISABLED": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "soon",
        "OTEL_SPAN_EVENT_COUNT_LIMIT": "many",
        "OTEL_PROPAGATORS": "b3",
        "OTEL_CONFIG_FILE": "/nonexistent.yaml",
        "OTEL_EXPORTER_OTLP_HEADERS": "sesame",
    }
    running = start({"upstream.url": upstream.url, "workers": workers}, wrong)
    send(running.port)
    assert running.stop() == 0
    assert len(upstream.messages) == 1
    told = [line["variable"] for line in running.log if line["event"] == "telemetry variable cannot be used"]
    assert sorted(told) == sorted(wrong)
    assert "sesame" not in running.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("uses_uvloop", [True, False], ids=["uvloop", "asyncio"])
def test_a_signal_to_the_whole_process_group_is_one_signal(
    uses_uvloop: bool,
    number: signal.Signals,
    upstream: CapturingUpstream,
    start: StartGateway,
    connect: Callable[[int], Client],
) -> None:
    running = two_workers(upstream, start, uses_uvloop=uses_uvloop)
    idle, clients = connect(running.port), [connect(running.port) for _ in range(6)]
    idle.opens()
    for client in clients:
        client.opens_content()
    os.killpg(running.pid, number)  # as a terminal's Ctrl-C does: workers hear it, and hear it again from their parent
    assert idle.reply().startswith("421 4.3.2 ")
    for client in clients:
        assert client.asks("Subject: y\r\n\r\n.").startswith("250 ")
        assert client.reply().startswith("421 4.3.2 ")
    assert running.wait() == 0
    assert len(upstream.messages) == 6
    assert "stopping at once" not in running.stderr


def awaited_signals(process_id: int) -> int:
    """The signals that were sent to a process and not yet delivered, as a set of bits."""
    return status_bits(process_id, "ShdPnd")


def status_bits(process_id: int, name: str) -> int:
    """A set of signals from a process's status."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(re.findall(rf"^{name}:\s+(\w+)$", status, re.MULTILINE)[0], 16)


def test_told_twice_the_workers_stop_at_once(
    upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    running = two_workers(upstream, start)
    clients = [connect(running.port) for _ in range(6)]
    for client in clients:
        client.opens_content()
    os.killpg(running.pid, signal.SIGINT)
    until(lambda: (listening_sockets(running.port) == 0) or None, "nobody listens any more")
    # The workers may be quicker than their parent; of two signals that wait for one process, the kernel keeps one.
    until(lambda: not awaited_signals(running.pid) or None, "the parent has heard the first")
    began = time.monotonic()
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait() == 0
    assert time.monotonic() - began < 10  # less than the grace
    for client in clients:
        assert client.reply().startswith("421 4.3.2 ")
    assert upstream.messages == []


def test_a_worker_that_dies_is_started_again(upstream: CapturingUpstream, start: StartGateway) -> None:
    running = two_workers(upstream, start)
    victim = min(running.children)
    others = running.children - {victim}
    os.kill(victim, signal.SIGKILL)
    until(lambda: (len(running.children - {victim}) == 2) or None, "a new worker")
    assert others < running.children
    for _ in range(10):
        send(running.port)
    assert len(upstream.messages) == 10
    assert running.stop() == 0


def stopped(worker: int) -> bool | None:
    return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "T" or None


def test_who_waits_for_a_worker_that_dies_is_greeted_by_its_successor(
    upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    running = two_workers(upstream, start)
    victims = running.children
    for victim in victims:
        os.kill(victim, signal.SIGSTOP)  # so that the kernel completes connections that no worker accepts
    for victim in victims:
        until(lambda: stopped(victim), "the worker stands still")  # noqa: B023 - called here
    with contextlib.ExitStack() as waiting:
        clients = [
            waiting.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=30)) for _ in range(8)
        ]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        assert [client.recv(4) for client in clients] == [b"220 "] * 8
    assert running.stop() == 0


@pytest.mark.parametrize("uses_uvloop", [True, False], ids=["uvloop", "asyncio"])
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_who_waits_for_a_worker_that_leaves_is_answered(
    number: signal.Signals, uses_uvloop: bool, upstream: CapturingUpstream, start: StartGateway
) -> None:
    running = two_workers(upstream, start, uses_uvloop=uses_uvloop)
    workers = running.children
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    for worker in workers:
        until(lambda: stopped(worker), "the worker stands still")  # noqa: B023 - called here
    with contextlib.ExitStack() as waiting:
        clients = [
            waiting.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=30)) for _ in range(16)
        ]
        if number is signal.SIGTERM:
            running.signal(number)
        else:
            for worker in workers:
                os.kill(worker, number)  # as their parent does when a successor serves
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        answers = {client.recv(4) for client in clients}
    assert answers <= {b"220 ", b"421 "}
    assert running.stop() == 0


def test_a_unix_socket_is_served_by_the_other_worker_when_one_dies(
    upstream: CapturingUpstream, start: StartGateway, tmp_path: Path
) -> None:
    path = str(tmp_path / "smtp")
    at = {"listener.address": ["127.0.0.1:0", f"unix:{path}"]}
    running = start({"upstream.url": upstream.url, "workers": 2, **at})
    for victim in sorted(running.children):
        os.kill(victim, signal.SIGKILL)
        until(lambda: (victim not in running.children) or None, "it is gone")  # noqa: B023 - called here
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(path)
            assert client.recv(4) == b"220 "
        until(lambda: (len(running.children) == 2) or None, "a new worker")
    assert running.stop() == 0
    assert not os.path.exists(path)


def test_nobody_waits_at_a_unix_socket_while_the_workers_drain(
    upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client], tmp_path: Path
) -> None:
    path = str(tmp_path / "smtp")
    at = {"listener.address": ["127.0.0.1:0", f"unix:{path}"]}
    running = start({"upstream.url": upstream.url, "workers": 2, **at})
    client = connect(running.port)
    client.opens_content()
    running.signal(signal.SIGTERM)

    def refused() -> bool | None:
        with socket.socket(socket.AF_UNIX) as late:
            return late.connect_ex(path) != 0 or None

    until(refused, "its end", timeout_seconds=15)  # of 25 s
    assert client.asks("Subject: y\r\n\r\n.").startswith("250 ")
    assert running.wait() == 0


def test_workers_are_replaced_one_by_one(upstream: CapturingUpstream, start: StartGateway) -> None:
    running = two_workers(upstream, start)
    before = running.children
    running.signal(signal.SIGUSR2)
    until(lambda: (len(running.children) == 2 and not running.children & before) or None, "two new workers")
    for _ in range(10):
        send(running.port)
    assert len(upstream.messages) == 10
    assert running.stop() == 0


def asked(status: int, path: str, accept: str = "*/*") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{status}{path}", headers={"accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def silent_processes(status: int) -> list[int]:
    """The processes of which the page says that they do not answer; all, where there is no page."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{status}/api/stream", timeout=3) as stream:
            picture = next(line for line in stream if line.startswith(b"data: "))
    except (OSError, StopIteration):
        return [0, 1]
    silent: list[int] = json.loads(picture[6:])["silent_processes"]
    return silent


def relayed_by_process(status: int) -> dict[str, float]:
    """Of the processes that answered in time and have relayed any: a busy machine may need a second look."""
    sample = r'smtp_server_transactions_total\{worker="(\d)",smtp_outcome="relayed"\} ([\d.]+)'
    counts = {number: float(count) for number, count in re.findall(sample, asked(status, "/metrics"))}
    return {number: count for number, count in counts.items() if count}


def two_workers_with_a_page(upstream: CapturingUpstream, start: StartGateway) -> tuple[GatewayProcess, int]:
    """The gateway, and its status port."""
    status = unclaimed_port()
    return start({"upstream.url": upstream.url, "workers": 2, "status.address": f"127.0.0.1:{status}"}), status


def send_until_both_have_relayed(running: GatewayProcess, status: int) -> int:
    """How many mails that took: the kernel spreads connections by the client's port."""
    sent = 0
    while sent < 200 and len(relayed_by_process(status)) < 2:
        send(running.port)
        sent += 1
    return sent


def shown(status: int, count: int) -> list[dict[str, Any]] | None:
    """The connections on the page, once they are as many."""
    rows: list[dict[str, Any]] = json.loads(asked(status, "/api/connections"))["connections"]
    return rows if len(rows) == count else None


def found(status: int, count: int) -> list[dict[str, Any]] | None:
    """The traces that a search finds, once they are as many."""
    answer = json.loads(asked(status, "/api/traces"))
    traces: list[dict[str, Any]] = answer["traces"]
    return traces if answer["found"] == count else None


def spans_of(status: int, trace_id: str) -> int | None:
    """How many spans a trace has; None where nobody told."""
    try:
        parts = json.loads(asked(status, f"/api/traces/{trace_id}"))["resourceSpans"]
    except urllib.error.HTTPError:
        return None
    return sum(len(part["scopeSpans"][0]["spans"]) for part in parts)


@pytest.mark.long
def test_one_status_page_tells_of_all_workers(
    upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    running, status = two_workers_with_a_page(upstream, start)
    sent = send_until_both_have_relayed(running, status)
    until(lambda: sum(relayed_by_process(status).values()) == sent or None, "both tell what they relayed")
    clients = [connect(running.port) for _ in range(40)]
    rows = until(lambda: shown(status, len(clients)), "all are shown")
    assert {row["worker"] for row in rows} == {0, 1}
    traces = until(lambda: found(status, sent), "all traces are found")
    for trace_id in [trace["trace_id"] for trace in traces]:
        until(functools.partial(spans_of, status, trace_id), "each can be opened")
    assert json.loads(asked(status, "/readyz"))["reasons"] == {}
    page = asked(status, "/metrics")
    promtool = [tool("promtool"), "check", "metrics"]
    checked = subprocess.run(promtool, input=page, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    families = list(parse_openmetrics(asked(status, "/metrics", OPENMETRICS)))  # type: ignore[no-untyped-call]  # as it is
    assert len({family.name for family in families}) == len(families)
    # Both are replaced, and the page goes over to their successors.
    before = running.children
    running.signal(signal.SIGUSR2)
    until(lambda: (len(running.children) == 2 and not running.children & before) or None, "two new workers")

    more = [connect(running.port) for _ in range(40)]

    def of_successors() -> list[dict[str, Any]] | None:
        try:
            return shown(status, len(more))
        except OSError:  # the last that the old one was asked
            return None

    rows = until(of_successors, "the page shows the successors")
    assert {row["worker"] for row in rows} == {0, 1}
    assert running.stop() == 0


@pytest.mark.long
def test_while_workers_are_replaced_the_page_tells_of_the_successors_alone(
    upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    running, status = two_workers_with_a_page(upstream, start)
    sent = send_until_both_have_relayed(running, status)
    clients = [connect(running.port) for _ in range(16)]
    for client in clients:
        client.opens_content()  # so that both predecessors drain for as long as this test takes
    running.signal(signal.SIGUSR2)
    until(lambda: (running.stderr.count('"draining"') == 2) or None, "both successors serve")
    # A drain begins with the status port.
    until(lambda: (relayed_by_process(status) == {}) or None, "both predecessors drain")
    for _ in range(10):
        assert json.loads(asked(status, "/readyz")) == {"status": "ready", "reasons": {}}
        assert relayed_by_process(status) == {}
    assert len(running.children) == 4
    for client in clients:
        assert client.asks("Subject: y\r\n\r\n.").startswith("250 ")
    until(lambda: (len(running.children) == 2) or None, "the predecessors have ended")
    assert len(upstream.messages) == sent + len(clients)
    assert running.stop() == 0


@pytest.mark.long
def test_the_page_names_a_worker_that_is_gone_until_it_is_back(
    upstream: CapturingUpstream, start: StartGateway
) -> None:
    running, status = two_workers_with_a_page(upstream, start)
    assert silent_processes(status) == []
    missed = []
    for victim in running.children:
        os.kill(victim, signal.SIGSTOP)  # it holds its ports, and answers nobody
        missed.append(until(lambda: silent_processes(status) or None, "the page misses it"))
        os.kill(victim, signal.SIGKILL)
        until(lambda: (silent_processes(status) == []) or None, "the page shows all again")
    assert sorted(missed) == [[0, 1], [1]]  # without the first there is no page
    assert json.loads(asked(status, "/readyz"))["reasons"] == {}
    assert running.stop() == 0


def test_a_status_port_that_is_taken_is_not_shared(upstream: CapturingUpstream, start: StartGateway) -> None:
    first, status = two_workers_with_a_page(upstream, start)
    until(lambda: asked(status, "/livez"), "it serves")
    with pytest.raises(AssertionError, match="in use"):
        start({"upstream.url": upstream.url, "workers": 2, "status.address": f"127.0.0.1:{status}"})
    assert first.stop() == 0


@pytest.mark.long
def test_after_random_signals_and_kills_there_are_as_many_workers_as_asked_for(tmp_path: Path) -> None:
    outcome = storm(4, tmp_path, seed=2)
    assert outcome.is_right, outcome.told()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_before_readiness_does_not_end_the_gateway(
    workers: int, upstream: CapturingUpstream, tmp_path: Path
) -> None:
    path = settings_file({"upstream.url": upstream.url, "workers": workers, "status.address": "off"}, tmp_path)
    command = [sys.executable, "-m", "otel_smtp", "serve", "--config", str(path), "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        held_back = 1 << (signal.SIGHUP - 1)
        until(lambda: (status_bits(process.pid, "SigBlk") & held_back) or None, "it holds SIGHUP back")
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
