"""Settings read again by a running gateway: what changes, for whom, and that nothing wrong changes anything."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Client
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.ports import unclaimed_port
from tests.support.process import DEFAULTS, ROOT, gateway, listening_sockets, settings_file, until

ConnectClient = Callable[[int], Client]


class Reloaded:
    """A gateway whose settings file can be changed."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        self.status = unclaimed_port()
        self.settings = {"status.address": f"127.0.0.1:{self.status}", **settings}

    def write(self, **changes: Any) -> None:
        """Write the file, with other settings by name (`__` for the dot)."""
        self.settings |= {key.replace("__", "."): value for key, value in changes.items()}
        settings_file({**DEFAULTS, **self.settings}, self.directory)

    def has_reloaded(self, times: int) -> bool | None:
        """Whether it has, by its status port."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.status}/api/reloads", timeout=15) as answer:
            [process] = json.load(answer)["processes"]
        return process["reloads"] >= times or None

    def reload(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run `otel-smtp reload`."""
        command = [sys.executable, "-m", "otel_smtp", "reload", "--config", str(self.directory / "settings.toml")]
        return subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)


def mail(client: Client, *recipients: str) -> list[str]:
    """The replies to RCPT and to the content, of a mail to `recipients`."""
    assert client.asks("MAIL FROM:<a@client.example>").startswith("250")
    replies = [client.asks(f"RCPT TO:<{recipient}>") for recipient in recipients]
    assert client.asks("DATA").startswith("354")
    return [*replies, end(client)]


def connected(connect: ConnectClient, port: int) -> Client | None:
    """A client, where somebody listens."""
    try:
        return connect(port)
    except ConnectionRefusedError:
        return None


def end(client: Client) -> str:
    """The reply to a content."""
    client.say("Subject: x", "", "y", ".")
    return client.reply()


@pytest.mark.parametrize("workers", [1, 2])
def test_new_connections_get_new_limits_and_open_ones_keep_theirs(
    workers: int, upstream: CapturingUpstream, tmp_path: Path, connect: ConnectClient
) -> None:
    changed = Reloaded(tmp_path, {"upstream.url": upstream.url, "workers": workers})
    changed.write()
    with gateway(changed.settings, tmp_path) as running:
        before = connect(running.port)
        before.opens()
        changed.write(limits__recipients=1, telemetry__probes=True)
        done = changed.reload()
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "reloaded; changed: limits.recipients, telemetry.probes\n"
        assert [reply[:3] for reply in mail(before, "b@there.example", "c@there.example")] == ["250", "250", "250"]
        for _ in range(4 * workers):  # whichever worker gets it
            client = connect(running.port)
            client.opens()
            replies = mail(client, "b@there.example", "c@there.example")
            assert [reply[:3] for reply in replies] == ["250", "452", "250"]
        assert [line["event"] for line in running.log if "reload" in line["event"]] == ["settings reloaded"]
        assert running.stop() == 0


def test_a_worker_that_is_replaced_has_the_new_settings(
    upstream: CapturingUpstream, tmp_path: Path, connect: ConnectClient
) -> None:
    changed = Reloaded(tmp_path, {"upstream.url": upstream.url, "workers": 2})
    changed.write()
    with gateway(changed.settings, tmp_path) as running:
        changed.write(limits__recipients=1)
        assert changed.reload().returncode == 0
        before = running.children
        for process_id in before:
            os.kill(process_id, signal.SIGKILL)
        until(
            lambda: (not running.children & before and listening_sockets(running.port) == 2) or None,
            "they are replaced",
        )
        client = until(partial(connected, connect, running.port), "one of them accepts")
        client.opens()
        assert [reply[:3] for reply in mail(client, "b@there.example", "c@there.example")] == ["250", "452", "250"]
        assert running.stop() == 0


def test_wrong_settings_change_nothing_and_are_told(
    upstream: CapturingUpstream, tmp_path: Path, connect: ConnectClient
) -> None:
    changed = Reloaded(tmp_path, {"upstream.url": upstream.url})
    changed.write()
    with gateway(changed.settings, tmp_path) as running:
        changed.write(limits__recipients=1, limits__errors="many")
        done = changed.reload()
        assert (done.returncode, done.stdout) == (2, "")
        assert "limits.errors" in done.stderr
        assert "settings.toml" in done.stderr
        running.signal(signal.SIGHUP)  # who does not ask first
        until(lambda: [line for line in running.log if "not reloaded" in line["event"]] or None, "it is logged")
        [line] = [line for line in running.log if "not reloaded" in line["event"]]
        assert line["level"] == "error"
        assert "limits.errors" in line["problems"][0]
        client = connect(running.port)
        client.opens()
        assert [reply[:3] for reply in mail(client, "b@there.example", "c@there.example")] == ["250", "250", "250"]
        changed.write(limits__errors=10, limits__recipients=1000)
        assert changed.reload().stdout == "reloaded; no setting has changed\n"
        assert running.stop() == 0


def test_what_needs_a_restart_is_told(upstream: CapturingUpstream, tmp_path: Path) -> None:
    changed = Reloaded(tmp_path, {"upstream.url": upstream.url})
    changed.write()
    with gateway(changed.settings, tmp_path) as running:
        changed.write(hostname="other.example", delivery__strategy="buffered")
        done = changed.reload("--json")
        [told] = [json.loads(line) for line in done.stdout.splitlines()]
        assert (told["changed"], told["needs_restart"]) == (["delivery.strategy"], ["hostname"])
        assert told["pid"] == running.pid
        assert changed.reload().stdout == "reloaded; no setting has changed\nas before until a restart: hostname\n"
        assert running.stop() == 0


def test_mail_goes_to_the_new_upstream_and_what_is_under_way_ends_at_the_old(
    upstream: CapturingUpstream, tmp_path: Path, connect: ConnectClient
) -> None:
    changed = Reloaded(tmp_path, {"upstream.url": upstream.url, "upstream.name": "old"})
    changed.write()
    with CapturingUpstream() as other, gateway(changed.settings, tmp_path) as running:
        client = connect(running.port)
        client.opens_content()
        idle = connect(running.port)
        idle.opens()
        assert mail(idle, "c@there.example")[-1].startswith("250")
        changed.write(upstream__url=other.url, upstream__name="new")
        assert changed.reload().returncode == 0
        assert end(client).startswith("250 ")
        assert mail(client, "d@there.example")[-1].startswith("250 ")
        [first, second] = upstream.wait_for_messages(2)
        assert {first.recipients[0], second.recipients[0]} == {"b@there.example", "c@there.example"}
        [third] = other.wait_for_messages(1)
        assert third.recipients[0] == "d@there.example"
        until(lambda: all(one.is_over for one in upstream.connections) or None, "the old connections are closed")
        assert running.stop() == 0


def test_no_mail_is_lost_while_settings_are_reloaded_again_and_again(
    upstream: CapturingUpstream, tmp_path: Path, connect: ConnectClient
) -> None:
    changed = Reloaded(tmp_path, {"upstream.url": upstream.url, "upstream.name": "a", "delivery.strategy": "buffered"})
    changed.write()
    with gateway(changed.settings, tmp_path) as running:
        replies: list[str] = []

        def send() -> None:
            client = connect(running.port)
            client.opens()
            replies.extend(mail(client, "b@there.example")[-1] for _ in range(60))

        senders = [threading.Thread(target=send) for _ in range(4)]
        for sender in senders:
            sender.start()
        reloads = 0
        while any(sender.is_alive() for sender in senders):
            reloads += 1
            changed.write(upstream__name=f"a{reloads}", delivery__strategy=("buffered", "transparent")[reloads % 2])
            running.signal(signal.SIGHUP)
            until(partial(changed.has_reloaded, reloads), "it has reloaded")
        for sender in senders:
            sender.join()
        assert reloads
        assert [reply for reply in replies if not reply.startswith("250 ")] == []
        assert len(upstream.wait_for_messages(240)) == 240
        assert running.stop() == 0


def test_redaction_changes_with_the_next_mail(
    upstream: CapturingUpstream, receiver: OtlpReceiver, tmp_path: Path, connect: ConnectClient
) -> None:
    changed = Reloaded(tmp_path, {"upstream.url": upstream.url, "log.level": "warning"})
    changed.write()
    with gateway(
        changed.settings,
        tmp_path,
        environ={
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        },
    ) as running:
        client = connect(running.port)
        client.opens()
        mail(client, "b@first.example")
        changed.write(telemetry__addresses="none", log__level="info")
        assert changed.reload().returncode == 0
        mail(client, "b@second.example")
        client.asks("QUIT")
        assert running.stop() == 0
        transactions = [span for span in receiver.spans if span.name == "smtp.transaction"]
        assert [span.attributes.get("smtp.rcpt.domains") for span in transactions] == [["first.example"], None]
        # The access log begins with the level that wants it.
        assert sum(line["event"] == "smtp.transaction" for line in running.log) == 1


def test_a_reload_needs_no_upstream_in_its_own_settings(tmp_path: Path) -> None:
    changed = Reloaded(tmp_path, {})
    (tmp_path / "settings.toml").write_text(f'status.address = "127.0.0.1:{changed.status}"\n')
    done = changed.reload()
    assert (done.returncode, "no gateway answers at 127.0.0.1" in done.stderr) == (1, True)


def test_a_signal_that_nobody_can_send_is_said(tmp_path: Path, upstream: CapturingUpstream) -> None:
    changed = Reloaded(tmp_path, {"upstream.url": upstream.url})
    changed.write()
    done = changed.reload()
    assert done.returncode == 1
    assert "no gateway answers at 127.0.0.1" in done.stderr
    assert "--set status.address" in done.stderr
    with socket.create_server(("127.0.0.1", changed.status)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

        answering = threading.Thread(target=answer)
        answering.start()
        done = changed.reload()
        answering.join()
    assert done.returncode == 1
    assert "is not a gateway" in done.stderr
    changed.write(status__address="off")
    done = changed.reload()
    assert done.returncode == 1
    assert "send SIGHUP" in done.stderr
