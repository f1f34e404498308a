"""Acknowledged mail whose log and index are gone: what a running gateway says of it, and how it comes back."""

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from tests.durability.failing import send, settings_of
from tests.durability.killing import queue_command
from tests.durability.upstream import CountingUpstream
from tests.support.ports import unclaimed_port
from tests.support.process import gateway, until


def _readiness(port: int) -> tuple[int, dict[str, str]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return answer.status, json.load(answer)["reasons"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["reasons"]


def test_nothing_acknowledged_is_erased_where_log_and_index_are_lost(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    status = unclaimed_port()
    with CountingUpstream(0) as upstream:
        settings = {**settings_of(spool, upstream.port), "status.address": f"127.0.0.1:{status}"}
        upstream.is_closed, upstream.is_willing = True, True
        with gateway(settings, tmp_path) as running:
            assert send(running.port, "one", octets=200_000) == 250
            assert _readiness(status) == (200, {})
        shutil.rmtree(spool / "log")
        for file in spool.glob("index.*"):
            file.unlink()
        upstream.is_closed = False
        with gateway(settings, tmp_path) as running:
            (told,) = [line for line in running.log if line["level"] == "critical"]
            assert "lost+found" in json.dumps(told)
            code, reasons = _readiness(status)
            assert code == 503
            assert "queue rebuild" in reasons["spool"]
            assert send(running.port, "two") == 250
            until(lambda: upstream.taken["two"] or None, "other mail goes on")
            assert "queued again, and held" in queue_command(spool, "rebuild")
            assert queue_command(spool, "rebuild") == "nothing to queue again\n"
            assert _readiness(status) == (200, {})
            queue_command(spool, "release", "--all")
            until(lambda: upstream.taken["one"] or None, "it is delivered")
            assert "the upstream may have it already" in running.stderr
