"""A collector that is away, silent or hostile costs no mail a millisecond: side by side, in one run."""

import contextlib
import smtplib
import statistics
import time
from pathlib import Path

import pytest

from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import Fault, FaultKind, OtlpReceiver
from tests.support.ports import unclaimed_port
from tests.support.process import gateway

FAULTS = (FaultKind.NONE, FaultKind.BLACK_HOLE, FaultKind.UNAVAILABLE, FaultKind.SLOW, FaultKind.HUGE_REPLY)
ROUNDS = 6
MAILS = 60
CONTENT = b"Subject: timed\r\n\r\n" + b"x" * 76 + b"\r\n"


def latencies(client: smtplib.SMTP) -> list[float]:
    found = []
    for _ in range(MAILS):
        began = time.perf_counter()
        client.sendmail("a@client.example", ["b@there.example"], CONTENT)
        found.append((time.perf_counter() - began) * 1e3)
    return found


@pytest.mark.long
def test_mail_is_as_quick_whatever_the_collector_does(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(CapturingUpstream())
        endpoints = {"down": f"http://127.0.0.1:{unclaimed_port()}"}
        for kind in FAULTS:
            receiver = stack.enter_context(OtlpReceiver(with_grpc=False))
            receiver.fault = Fault(kind)
            endpoints[kind.name] = receiver.http_endpoint
        clients: dict[str, smtplib.SMTP] = {}
        for name, endpoint in endpoints.items():
            (tmp_path / name).mkdir()
            running = stack.enter_context(
                gateway(
                    {"upstream.url": upstream.url, "limits.messages_per_connection": 10_000, "log.level": "error"},
                    tmp_path / name,
                    # Small batches, so that the exporter is at work all the time.
                    environ={"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{endpoint}/v1/traces",
                             "OTEL_BSP_SCHEDULE_DELAY": "20", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "16"},
                )
            )  # fmt: skip
            clients[name] = stack.enter_context(smtplib.SMTP("127.0.0.1", running.port))
            latencies(clients[name])
        # The turns alternate, so that whatever else the machine does is done to all of them.
        found: dict[str, list[list[float]]] = {name: [] for name in endpoints}
        for _ in range(ROUNDS):
            for name, client in clients.items():
                found[name].append(sorted(latencies(client)))
    # A round's middle and its slowest mail but two (p95); of the rounds the median, so that a machine which stands
    # still for a moment decides nothing, while a collector's fault is there in every round.
    middle = {name: statistics.median(statistics.median(each) for each in rounds) for name, rounds in found.items()}
    slow = {name: statistics.median(each[-3] for each in rounds) for name, rounds in found.items()}
    print({name: (round(middle[name], 2), round(slow[name], 2)) for name in found})
    for name in found:
        assert middle[name] < middle["NONE"] * 1.5 + 0.5, middle
        assert slow[name] < slow["NONE"] * 3 + 20, slow
