"""Readiness of the process: an upstream that is away is known without any mail, and so is its return."""

import json
import urllib.error
import urllib.request

from tests.end_to_end.conftest import StartGateway
from tests.support.capture import CapturingUpstream
from tests.support.ports import unclaimed_port
from tests.support.process import until


def readiness(port: int) -> tuple[int, dict[str, str]]:
    """The status of /readyz, and its reasons."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
            return answer.status, json.loads(answer.read())["reasons"]
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, json.loads(refusal.read())["reasons"]


def test_an_upstream_that_is_away_makes_the_gateway_unready(start: StartGateway) -> None:
    status = unclaimed_port()
    start({"upstream.url": f"smtp://127.0.0.1:{unclaimed_port()}", "status.address": f"127.0.0.1:{status}"})
    until(lambda: readiness(status)[0] == 503 or None, "it is known")
    assert readiness(status)[1] == {"upstream": "no upstream can be reached"}


def test_an_upstream_that_is_there_is_not_bothered_with_mail(start: StartGateway, upstream: CapturingUpstream) -> None:
    status = unclaimed_port()
    start({"upstream.url": upstream.url, "status.address": f"127.0.0.1:{status}"})
    assert readiness(status) == (200, {})
    until(lambda: any(connection.commands for connection in upstream.connections) or None, "it was looked at")
    assert readiness(status) == (200, {})
    assert [command.split()[0] for command in upstream.connections[0].commands] == [b"EHLO"]
