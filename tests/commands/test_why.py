"""`otel-smtp why` as a process, asking a gateway that runs, its queue, and nobody."""

import json
import re
import smtplib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from otel_smtp.smtp.replies import EnhancedStatus, Reply
from tests.commands.test_cli import Result, run
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript
from tests.support.ports import unclaimed_port
from tests.support.process import gateway, until

MAIL = "Subject: x\r\nMessage-ID: <17@shop.example>\r\n\r\nHello\r\n"
NO_USER = Reply(550, EnhancedStatus(5, 1, 1), ("No such user here",))


def why(directory: Path, *arguments: str) -> Result:
    return run("why", "--config", str(directory / "settings.toml"), *arguments, COLUMNS="120")


@pytest.fixture
def upstream() -> Iterator[CapturingUpstream]:
    with CapturingUpstream() as upstream:
        yield upstream


def test_it_tells_what_became_of_a_mail(upstream: CapturingUpstream, tmp_path: Path) -> None:
    upstream.say(UpstreamScript(recipients={"ann@example.org": NO_USER}))
    settings = {
        "upstream.url": upstream.url,
        "upstream.name": "provider",
        "telemetry.message_id": True,
        "status.address": f"127.0.0.1:{unclaimed_port()}",
    }
    with gateway(settings, tmp_path) as running, smtplib.SMTP("127.0.0.1", running.port) as client:
        client.sendmail("app@shop.example", ["bob@example.net", "ann@example.org"], MAIL)
        client.sendmail("app@shop.example", ["eve@example.com"], "Subject: another\r\n\r\nHello\r\n")
        # The transaction is told before the reply to it; its connection is open still.
        by_domain = why(tmp_path, "example.net")
        assert by_domain.returncode == 0, by_domain.stderr
        assert "shop.example -> example.net, example.org  partly relayed" in by_domain.stdout
        assert "  example.org: refused by provider: 550 5.1.1 No such user here\n" in by_domain.stdout
        assert "  1 recipient: accepted by provider (" in by_domain.stdout
        assert "example.com" not in by_domain.stdout, "of a connection with two mails, the one that was asked for"
        assert "smtp.delivery" in by_domain.stdout, "one mail: its waterfall"
        by_address = why(tmp_path, "bob@example.net")
        assert by_address.returncode == 0
        assert "traces hold domains, not addresses (telemetry.addresses = domain)" in by_address.stderr

        by_refused = why(tmp_path, "ann@example.org", "--no-waterfall")
        assert "550 5.1.1 No such user here" in by_refused.stdout, "found by the domain of who was refused"

        [mail] = [json.loads(line) for line in why(tmp_path, "17@shop.example", "--json").stdout.splitlines()]
        assert (mail["from"], mail["outcome"], mail["message_id"]) == ("trace", mail["outcome"], "<17@shop.example>")
        assert "accepted" in [one["fate"] for one in mail["fates"]]

        middle = mail["trace_id"][9:21]
        by_id = why(tmp_path, middle, "--no-waterfall")
        assert mail["trace_id"] in by_id.stdout
        assert "smtp.delivery" not in by_id.stdout

        nothing = why(tmp_path, "nobody.example")
        assert nothing.returncode == 1
        assert nothing.stdout == ""
        assert (
            f"nothing found of nobody.example\n  searched 1 traces of http://{settings['status.address']}, all since"
            in (nothing.stderr)
        )


def test_it_asks_the_queue_with_and_without_a_gateway(upstream: CapturingUpstream, tmp_path: Path) -> None:
    upstream.say(UpstreamScript(mail=(Reply(451, None, ("4.7.1 greylisted, come back",)),) * 100))
    settings = {
        "upstream.url": upstream.url,
        "delivery.mode": "queue",
        "spool.directory": str(tmp_path / "spool"),
        "spool.retry": ["1h"],
        "status.address": f"127.0.0.1:{unclaimed_port()}",
    }
    with gateway(settings, tmp_path) as running:
        with smtplib.SMTP("127.0.0.1", running.port) as client:
            client.sendmail("app@shop.example", ["ann@example.org"], MAIL)
        told = until(
            lambda: told if "greylisted" in (told := why(tmp_path, "ann@example.org").stdout) else None,
            "it was attempted",
        )
        assert "-> example.org  queued" in told
        assert "in the queue as " in told
        assert re.search(r"1 attempt in \d+ s, next attempt in \d+ min, given up in 5.0 d", told), told
        assert "    ann@example.org: waits: 451 4.7.1 greylisted, come back" in told, told
        running.stop()

    alone = why(tmp_path, "example.org")
    assert alone.returncode == 0, alone.stderr
    assert "no gateway answers at http://127.0.0.1:" in alone.stderr
    assert "ann@example.org" in alone.stdout
    [row] = [json.loads(line) for line in why(tmp_path, "app@shop.example", "--json").stdout.splitlines()]
    assert (row["from"], row["recipients"][0]["address"]) == ("queue", "ann@example.org")
    assert row["queue_id"] in why(tmp_path, row["queue_id"][3:12]).stdout


def test_a_log_alone_tells_it_too(upstream: CapturingUpstream, tmp_path: Path) -> None:
    upstream.say(UpstreamScript(recipients={"ann@example.org": NO_USER}))
    settings = {"upstream.url": upstream.url, "upstream.name": "provider"}
    with gateway(settings, tmp_path) as running:
        with smtplib.SMTP("127.0.0.1", running.port) as client:
            client.sendmail("app@shop.example", ["bob@example.net", "ann@example.org"], MAIL)
            client.sendmail("app@shop.example", ["eve@example.com"], "Subject: another\r\n\r\nHello\r\n")
        running.stop()
    nobody = ("--url", f"127.0.0.1:{unclaimed_port()}", "--log", str(tmp_path / "stderr.log"))
    for what in ("example.org", "ann@example.org"):
        told = run("why", what, *nobody, COLUMNS="120")
        assert told.returncode == 0, told.stderr
        assert "shop.example -> example.net, example.org  partly relayed" in told.stdout
        assert "  example.org: refused by provider: 550 5.1.1 No such user here\n" in told.stdout
        assert "  1 recipient: accepted by provider: 250 " in told.stdout
        assert "example.com" not in told.stdout
    [mail] = [json.loads(line) for line in run("why", "example.com", *nobody, "--json").stdout.splitlines()]
    assert (mail["from"], mail["outcome"]) == ("log", "relayed")
    assert mail["fates"][0]["words"].startswith("250 ")
    nothing = run("why", "nobody.example", *nobody)
    assert nothing.returncode == 1
    assert f"nothing found of nobody.example\n  searched the log in {tmp_path / 'stderr.log'}\n" in nothing.stderr
    missing = run("why", "x", "--url", nobody[1], "--log", str(tmp_path / "missing"))
    assert missing.returncode == 1
    assert f"{tmp_path / 'missing'}: No such file or directory" in missing.stderr
    locked = run("why", "x", "--url", nobody[1], "--set", f"spool.directory={'x' * 300}")
    assert locked.returncode == 1
    assert f"the queue: {'x' * 300}: File name too long" in locked.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["x", "--url", "ftp://h"], 2, '--url = "ftp://h": allowed: http://host:port'),
        (["x", "-s", "status.address=off"], 2, 'status.address is "off": there is no status port to ask; give --url'),
        (["x", "-s", "status.address=127.0.0.1:0"], 2, "status.address has port 0"),
        ([" "], 2, "why: give an address, a domain or an id"),
        (["x", "-s", "status.adress=y"], 2, "unknown key; did you mean address?"),
        (["x", "-n", "0"], 2, "0 is not in the range"),
    ],
)
def test_wrong_use(arguments: list[str], status: int, words: str) -> None:
    told = run("why", *arguments, COLUMNS="120")
    assert (told.returncode, told.stdout) == (status, "")
    assert words in told.stderr


def test_nobody_to_ask() -> None:
    port = unclaimed_port()
    told = run("why", "x", "--url", f"http://127.0.0.1:{port}")
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == f"otel-smtp: why: no gateway answers at http://127.0.0.1:{port}: connection refused\n"


class _Stranger(BaseHTTPRequestHandler):
    """Something that is no gateway."""

    def do_GET(self) -> None:
        status, body = (200, b'{"traces": 1}') if "q=to" in self.path else (403, b"not for you\x1b[2J")
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        pass


def test_what_answers_is_no_gateway() -> None:
    with HTTPServer(("127.0.0.1", 0), _Stranger) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        told = run("why", "x", "--url", f"http://127.0.0.1:{server.server_port}")
        thread.join()
    assert told.returncode == 1
    assert "is no gateway of this version" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_refusal_is_told() -> None:
    class Refusing(_Stranger):
        def do_GET(self) -> None:
            self.path = ""
            super().do_GET()

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        told = run("why", "x", "--url", f"127.0.0.1:{server.server_port}")
        thread.join()
    assert told.stderr == (
        f"otel-smtp: why: the gateway at http://127.0.0.1:{server.server_port} refuses: 403 not for you[2J\n"
    )
