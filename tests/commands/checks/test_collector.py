"""Collectors: all that receive a signal, reached as the gateway would reach them."""

import asyncio
from collections.abc import Mapping

import pytest

from otel_smtp.commands.checks.collector import check_collectors
from otel_smtp.commands.checks.findings import Finding
from tests.support.otlp_receiver import Fault, FaultKind, OtlpReceiver

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"


async def findings(environ: Mapping[str, str]) -> list[Finding]:
    return [finding async for finding in check_collectors(environ)]


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_all_three_signals_are_tried_and_nothing_is_recorded(protocol: str) -> None:
    with OtlpReceiver() as receiver:
        endpoint = receiver.http_endpoint if protocol == "http/protobuf" else receiver.grpc_endpoint
        found = await findings({ENDPOINT: endpoint, PROTOCOL: protocol})
        assert [finding.verdict for finding in found] == ["ok", "ok", "ok"]
        assert [finding.detail for finding in found] == ["accepts traces", "accepts metrics", "accepts logs"]
        assert len({finding.subject for finding in found}) == 3
        assert (receiver.requests, receiver.spans, receiver.metrics, receiver.logs) == (3, [], [], [])


async def test_only_the_signals_that_are_exported_are_tried() -> None:
    with OtlpReceiver(with_grpc=False) as receiver:
        endpoint = receiver.http_endpoint
        environ = {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{endpoint}/v1/metrics",
            "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": f"{endpoint}/nowhere",
        }
        metrics, logs = await findings(environ)
        assert metrics == ("ok", f"collector http/protobuf {endpoint}/v1/metrics", "accepts metrics")
        assert logs.verdict == "failed"
        assert logs.detail == "nothing is at /nowhere (404): check the path"
        traces, logs = await findings({ENDPOINT: endpoint, "OTEL_METRICS_EXPORTER": "none"})
        assert (traces.detail, logs.detail) == ("accepts traces", "accepts logs")


async def test_a_list_of_exporters_may_have_spaces() -> None:
    with OtlpReceiver(with_grpc=False) as receiver:
        others = {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
        environ = {"OTEL_TRACES_EXPORTER": "console, otlp", ENDPOINT: receiver.http_endpoint, **others}
        (finding,) = await findings(environ)
    assert (finding.verdict, finding.detail) == ("ok", "accepts traces")


@pytest.mark.parametrize("exporter", ["otlp_proto_http", "otlp_proto_grpc"])
async def test_the_sdks_own_exporters_are_tried_too(exporter: str) -> None:
    with OtlpReceiver() as receiver:
        endpoint = receiver.http_endpoint if exporter == "otlp_proto_http" else receiver.grpc_endpoint
        (finding,) = await findings(
            {
                "OTEL_TRACES_EXPORTER": exporter,
                ENDPOINT: endpoint,
                "OTEL_METRICS_EXPORTER": "none",
                "OTEL_LOGS_EXPORTER": "none",
            }
        )
    assert (finding.verdict, finding.detail) == ("ok", "accepts traces")


async def test_grpc_without_a_scheme_is_tls_as_for_the_gateway() -> None:
    with OtlpReceiver() as receiver:
        address = receiver.grpc_endpoint.removeprefix("http://")
        environ = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": address, PROTOCOL: "grpc"}
        (finding,) = await findings(environ)
        assert finding.verdict == "failed"
        assert finding.subject == f"collector grpc {address} traces"
        assert "for a collector in clear, write http:// in front of it" in finding.detail
        (finding,) = await findings({**environ, "OTEL_EXPORTER_OTLP_INSECURE": "true"})
        assert finding.verdict == "ok"


@pytest.mark.parametrize(
    ("protocol", "port_of", "detail"),
    [
        ("http/protobuf", "grpc", "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use the port for http/protobuf"),
        ("grpc", "http", "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or use the port for gRPC"),
    ],
)
async def test_the_port_of_the_other_protocol_is_named(protocol: str, port_of: str, detail: str) -> None:
    with OtlpReceiver() as receiver:
        endpoint = receiver.http_endpoint if port_of == "http" else receiver.grpc_endpoint
        for finding in await findings({ENDPOINT: endpoint, PROTOCOL: protocol}):
            assert finding.verdict == "failed"
            assert detail in finding.detail


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_a_collector_that_is_away(protocol: str) -> None:
    with OtlpReceiver() as receiver:
        endpoint = receiver.http_endpoint if protocol == "http/protobuf" else receiver.grpc_endpoint
        receiver.refuse()
        for finding in await findings({ENDPOINT: endpoint, PROTOCOL: protocol}):
            assert (finding.verdict, finding.detail) == ("failed", "cannot be reached: Connection refused")


@pytest.mark.parametrize(
    ("status", "detail"),
    [
        (401, "answers 401: check OTEL_EXPORTER_OTLP_HEADERS"),
        (403, "answers 403: check OTEL_EXPORTER_OTLP_HEADERS"),
        (500, "answers 500"),
        (503, "answers 503"),
    ],
)
async def test_a_collector_that_refuses(status: int, detail: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        (finding,) = await findings({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{port}/v1/traces"})
        assert (finding.verdict, finding.detail) == ("failed", detail)
        if status == 401:  # the SDK's credential provider could have helped
            plugin = {"OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER": "gcp"}
            (finding,) = await findings(
                {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{port}/v1/traces", **plugin}
            )
            assert finding.verdict == "warning"


async def test_a_grpc_collector_that_refuses() -> None:
    with OtlpReceiver() as receiver:
        receiver.fault = Fault(FaultKind.REJECTED)
        found = await findings({ENDPOINT: receiver.grpc_endpoint, PROTOCOL: "grpc"})
    assert [finding.detail for finding in found] == [
        f"does not accept {signal}: INVALID_ARGUMENT: rejected" for signal in ("traces", "metrics", "logs")
    ]


@pytest.mark.long
async def test_a_port_of_something_else() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for protocol in ("http/protobuf", "grpc"):
            environ = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{port}/v1/traces", PROTOCOL: protocol}
            (finding,) = await findings(environ)
            assert finding.verdict == "failed"
            assert finding.detail == "this is not an OTLP collector: 220 mail.example ESMTP"


async def test_the_headers_of_the_operator_are_sent_and_not_shown() -> None:
    with OtlpReceiver(with_grpc=False) as receiver:
        endpoint = receiver.http_endpoint.replace("//", "//user:hunter2@")
        found = await findings({ENDPOINT: endpoint, "OTEL_EXPORTER_OTLP_HEADERS": "api-key=sesame"})
        assert [headers["api-key"] for headers in receiver.headers] == ["sesame"] * 3
    assert all(finding.verdict == "ok" for finding in found)
    assert not any("hunter2" in str(finding) or "sesame" in str(finding) for finding in found)


async def test_tls_that_fails_and_a_file_that_is_missing() -> None:
    with OtlpReceiver(with_grpc=False) as receiver:
        environ = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.http_endpoint.replace("http:", "https:")}
        (finding,) = await findings(environ)
        assert finding.verdict == "failed"
        assert finding.detail.startswith("cannot be reached: TLS: ")
        wrong, finding = await findings({**environ, "OTEL_EXPORTER_OTLP_CERTIFICATE": "/nonexistent.pem"})
        assert wrong.detail.startswith("OTEL_EXPORTER_OTLP_CERTIFICATE='/nonexistent.pem': ")
        assert finding.detail == "its TLS files cannot be used: No such file or directory"


@pytest.mark.parametrize(
    "environ",
    [{}, {"OTEL_SDK_DISABLED": "true", ENDPOINT: "http://127.0.0.1:1"}, {"OTEL_TRACES_EXPORTER": "console"}],
)
async def test_without_a_collector_nothing_is_dialled(environ: dict[str, str]) -> None:
    assert await findings(environ) == [Finding("ok", "collector", "none is set: nothing is exported")]


async def test_a_wrong_variable_is_a_finding() -> None:
    finding, _ = await findings({"OTEL_LOGS_EXPORTER": "syslog"})
    assert finding.verdict == "failed"
    assert "OTEL_LOGS_EXPORTER='syslog'" in finding.detail
