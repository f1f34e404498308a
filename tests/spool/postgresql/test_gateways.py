"""Several real gateways on one queue: killed, stopped, without their database."""

import asyncio
import contextlib
import json
import os
import signal
import smtplib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from otel_smtp.spool.postgresql import QueueLocation
from tests.durability.away import go_away
from tests.durability.sharing import (
    TAKEOVER_SECONDS,
    SharedBooks,
    keep_limits,
    kill_in_turn,
    queue_command,
    stop_at_known_moments,
)
from tests.end_to_end.test_traces import exporting
from tests.end_to_end.test_workers import Clocked
from tests.spool.postgresql.schemas import new_place
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript, scripted_reply
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.ports import unclaimed_port
from tests.support.postgresql import server
from tests.support.process import DEFAULTS, GatewayProcess, gateway, settings_file, until

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


@pytest.fixture
def place() -> QueueLocation:
    return asyncio.run(new_place(takeover_seconds=TAKEOVER_SECONDS))


def check(books: SharedBooks) -> None:
    """Nothing is lost, and whatever came twice was known."""
    assert books.lost == set(), books.told()
    assert books.unmarked_duplicates == set(), books.told()
    assert books.is_balanced, books.told()
    assert books.left == 0, books.told()
    assert max(books.takeovers, default=0) <= TAKEOVER_SECONDS + 2, books.told()


def test_a_killed_gateway_loses_nothing_and_without_a_kill_nothing_comes_twice(
    place: QueueLocation, tmp_path: Path
) -> None:
    books = kill_in_turn(place, tmp_path, 1, mails=100)
    print(books.told())
    check(books)
    assert len(books.takeovers) == 1


def test_a_gateway_that_is_stopped_for_longer_than_its_lease_sends_no_content(
    place: QueueLocation, tmp_path: Path
) -> None:
    books = stop_at_known_moments(place, tmp_path)
    # Stopped before content leaves, it lets none leave. After it, both have delivered, and the other had said so.
    assert books.taken == {"RCPT": 1, "DATA": 1, "content": 2}
    assert (books.marked, books.stale) == (3, 3)


@contextlib.contextmanager
def two_gateways(
    place: QueueLocation, upstream: CapturingUpstream, directory: Path, receiver: OtlpReceiver | None = None
) -> Iterator[list[GatewayProcess]]:
    """Two gateways with names of their own."""
    settings = {
        "upstream.url": upstream.url,
        "delivery.mode": "queue",
        "spool.url": place.url,
        "spool.schema": place.schema,
        "spool.takeover_after": f"{TAKEOVER_SECONDS}s",
        "spool.retry": ["1s"],
        "status.address": "127.0.0.1:0",
    }
    with contextlib.ExitStack() as stack:
        running = []
        for name in ("first", "second"):
            (directory / name).mkdir()
            environ = {"OTEL_RESOURCE_ATTRIBUTES": f"service.instance.id={name}"}
            if receiver is not None:
                environ |= exporting(receiver, "http/protobuf")
            running.append(stack.enter_context(gateway(settings, directory / name, environ=environ)))
        yield running


def send(running: GatewayProcess, subject: str = "x") -> tuple[int, str]:
    """A mail; code and text of the reply to it."""
    with smtplib.SMTP("127.0.0.1", running.port, timeout=45) as client:
        client.ehlo()
        code, text = client.mail("app@example.com")
        if code == 250:
            client.rcpt("user@example.net")
            code, text = client.data(f"Subject: {subject}\r\n\r\nHello\r\n".encode())
    return code, text.decode()


def test_the_trace_goes_on_in_the_gateway_that_takes_over(place: QueueLocation, tmp_path: Path) -> None:
    with (
        CapturingUpstream() as upstream,
        OtlpReceiver() as receiver,
        two_gateways(place, upstream, tmp_path, receiver) as (first, _),
    ):
        held = upstream.hold("content")
        code, text = send(first)
        assert code == 250
        trace_id = text.rpartition("trace=")[2].strip()
        assert held.reached.wait(15)
        receiver.wait_for_spans(
            lambda spans: any(span.trace_id == trace_id and span.name == "smtp.transaction" for span in spans)
        )
        first.signal(signal.SIGKILL)
        first.wait()
        deliveries = [
            span
            for span in receiver.wait_for_spans(
                lambda spans: any(span.trace_id == trace_id and span.name == "smtp.delivery" for span in spans)
            )
            if span.trace_id == trace_id and span.name == "smtp.delivery"
        ]
        spans = [span for span in receiver.spans if span.trace_id == trace_id]
        assert {span.resource["service.instance.id"] for span in spans} == {"first", "second"}
        (delivery,) = deliveries
        assert delivery.resource["service.instance.id"] == "second"
        assert delivery.attributes["smtp.delivery.possible_duplicate"] is True
        assert delivery.attributes["smtp.delivery.attempt"] == 2
        (event,) = [event for event in delivery.events if event.name == "smtp.spool.taken_over"]
        assert event.attributes["smtp.spool.taken_over.from"] == "first"
        assert TAKEOVER_SECONDS <= event.attributes["smtp.spool.taken_over.silent"] <= TAKEOVER_SECONDS + 4
        held.release()


def test_without_its_database_a_gateway_answers_451_and_comes_back(tmp_path: Path) -> None:
    absence = go_away(tmp_path, 0.0)
    assert absence.is_right, absence.told()


def test_workers_share_the_queue_and_commands_reach_it(place: QueueLocation, tmp_path: Path) -> None:
    settings = {
        "delivery.mode": "queue",
        "spool.url": place.url,
        "spool.schema": place.schema,
        "spool.takeover_after": f"{TAKEOVER_SECONDS}s",
        "workers": 2,
    }
    with (
        CapturingUpstream(UpstreamScript(content=(scripted_reply("451 4.3.0 later"),))) as upstream,
        gateway({**settings, "upstream.url": upstream.url}, tmp_path) as running,
    ):
        path = tmp_path / "settings.toml"
        until(lambda: len(queue_command(path, "gateways", "--json").splitlines()) == 2 or None, "both have entered")
        assert send(running)[0] == 250
        until(lambda: upstream.messages or None, "its first attempt")

        def waiting() -> str | None:
            lines = queue_command(path, "list", "--json").splitlines()
            shown = [json.loads(line) for line in lines]
            return shown[0]["queue_id"] if shown and shown[0]["queue_name"] == "deferred" else None

        queue_id = until(waiting, "it is deferred")
        assert "451 4.3.0 later" in queue_command(path, "show", queue_id)
        assert queue_command(path, "hold", queue_id, "--as", "ann") == "1 held\n"
        assert queue_command(path, "release", queue_id) == "1 released\n"
        upstream.wait_for_messages(2, 10)  # at once: the gateways are notified, whatever process made the change
        assert running.stop() == 0
    # By one of them, in its log and in the mail's trace.
    changes = [line for line in running.log if line["event"] == "queued message changed by an operator"]
    assert [(line["command"], line["operator"]) for line in changes] == [("hold", "ann"), ("release", "owner")]
    traced = [line for line in running.log if "smtp.spool.operator" in line]
    assert [line["trace_id"] for line in traced] == [line["trace_id"] for line in changes]
    assert queue_command(path, "gateways") == ""
    assert json.loads(queue_command(path, "counts"))["recipients"]["delivered"] == 1


def test_killed_gateways_never_exceed_the_rate_and_connections_of_their_provider(
    place: QueueLocation, tmp_path: Path
) -> None:
    kept = keep_limits(place, tmp_path, 1, mails=90, count=20, period_seconds=1.0)
    check(kept.books)
    assert kept.most_open <= 3, kept.told()
    assert kept.most_in_a_window <= 20, kept.told()


def test_two_gateways_keep_the_rate_of_their_provider_together(place: QueueLocation, tmp_path: Path) -> None:
    shared = {
        "delivery.mode": "queue",
        "spool.url": place.url,
        "spool.schema": place.schema,
        "upstream.limits": ["rate"],
        "limit.name": "rate",
        "limit.rate": "8/s",
        "limit.burst": 4,
    }
    with CapturingUpstream() as upstream, contextlib.ExitStack() as stack:
        upstream.messages = clocked = Clocked()
        running = []
        for name in ("first", "second"):
            (directory := tmp_path / name).mkdir()
            running.append(stack.enter_context(gateway({**shared, "upstream.url": upstream.url}, directory)))
        for one in running:
            with smtplib.SMTP("127.0.0.1", one.port, timeout=45) as client:
                for _ in range(16):
                    client.sendmail("app@example.com", ["user@example.net"], b"Subject: x\r\n\r\nHello\r\n")
        upstream.wait_for_messages(32, 60)
        told = queue_command(tmp_path / "first" / "settings.toml", "limits", "--json")
        assert json.loads(told)["most"] == 8
        assert queue_command(tmp_path / "first" / "settings.toml", "limits").startswith("rate  ")
    times = clocked.times
    assert len(times) == 32
    assert max(sum(1 for other in times[index:] if other < at + 1.0) for index, at in enumerate(times)) <= 8


def test_a_mail_that_two_gateways_attempted_is_found_as_one(place: QueueLocation, tmp_path: Path) -> None:
    """The first cannot reach the upstream, so the second delivers what the first took."""
    shared = {
        "delivery.mode": "queue",
        "spool.url": place.url,
        "spool.schema": place.schema,
        "spool.retry": ["1s"],
    }
    with CapturingUpstream() as upstream, contextlib.ExitStack() as stack:
        statuses: list[str] = []

        def start(name: str, url: str) -> GatewayProcess:
            (tmp_path / name).mkdir()
            statuses.append(f"127.0.0.1:{unclaimed_port()}")
            settings = {**shared, "upstream.url": url, "upstream.name": "up", "status.address": statuses[-1]}
            environ = {"OTEL_RESOURCE_ATTRIBUTES": f"service.instance.id={name}"}
            return stack.enter_context(gateway(settings, tmp_path / name, environ=environ))

        def why(*arguments: str) -> str:
            command = [sys.executable, "-m", "otel_smtp", "why", trace_id, "--no-waterfall", *arguments]
            command += ["--config", str(tmp_path / "first" / "settings.toml")]
            environ = {**os.environ, "COLUMNS": "200"}
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environ).stdout

        first = start("first", f"smtp://127.0.0.1:{unclaimed_port()}")
        code, text = send(first)
        assert code == 250
        trace_id = text.rpartition("trace=")[2].strip()
        assert "in the queue as " in why()
        second = start("second", upstream.url)
        upstream.wait_for_messages(1, 30)
        urls = [part for status in statuses for part in ("--url", status)]
        told = until(lambda: told if "accepted at attempt" in (told := why(*urls)) else None, "both tell of it")
        assert told.count(f"trace {trace_id}") == 1
        assert "connection refused; by gateway first" in told
        assert "by gateway second" in told
        [mail] = [json.loads(line) for line in why(*urls, "--json").splitlines()]
        assert mail["gateways"] == ["first", "second"]
        assert "by gateway" not in why(), "one gateway alone knows of no other"
        for running in (first, second):
            assert running.stop() == 0


def test_a_gateway_does_not_start_on_a_database_without_its_schema(tmp_path: Path) -> None:
    settings = {
        **DEFAULTS,
        "upstream.url": "smtp://127.0.0.1:1",
        "delivery.mode": "queue",
        "spool.url": server().url(),
        "spool.schema": "made_by_a_command",
    }
    path = settings_file(settings, tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "otel_smtp", *arguments, "--config", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    served = run("serve")
    assert served.returncode == 1
    assert "otel-smtp queue migrate" in served.stderr
    assert "otel-smtp queue migrate" in run("check", "--connect").stdout
    assert "CREATE TABLE" in run("queue", "migrate", "--dry-run").stdout
    assert run("queue", "migrate").stdout == "2 steps done\n"
    assert run("queue", "migrate").stdout == "0 steps done\n"
    assert "is usable; 0 gateways share it" in run("check", "--connect").stdout
    server().do("DROP SCHEMA made_by_a_command CASCADE")
