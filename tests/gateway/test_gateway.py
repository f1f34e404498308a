"""The gateway as a part of another program."""

import asyncio
import base64
import gc
import pkgutil
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trustme

import otel_smtp
from otel_smtp import CannotListen, CertificateError, ConnectionInfo, Gateway, Observer, Settings, Transition, load
from otel_smtp.config import assignment
from otel_smtp.gateway import gateway as gateway_module
from otel_smtp.gateway.running import leave_out_of_garbage_collection
from otel_smtp.gateway.status_port import StatusPort
from otel_smtp.observing import ConnectionRecord, Endpoint
from otel_smtp.smtp.states import CloseReason
from otel_smtp.telemetry import turns
from otel_smtp.telemetry.records import SpanRecord
from otel_smtp.telemetry.setup import Telemetry, set_up
from tests.support.capture import CapturingUpstream
from tests.support.ports import unclaimed_port

BY_TOKEN: Final = {
    "name": "tokens",
    "address": ["127.0.0.1:0"],
    "auth": "required",
    "auth_in_clear": True,
}
OPEN: Final = {"name": "open", "address": ["127.0.0.1:0"]}


@pytest.fixture(autouse=True)
def _nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")


@pytest.fixture
def upstream() -> Iterator[CapturingUpstream]:
    with CapturingUpstream() as capturing:
        yield capturing
    assert capturing.violations == []


def settings_for(upstream: CapturingUpstream, listener: dict[str, Any], *, verifies_tokens: bool = False) -> Settings:
    values = {"listener": [listener], "upstream": [{"url": upstream.url}], "status": {"address": "off"}}
    return load(values=values, verifies_tokens=verifies_tokens)


async def conversation(gateway: Gateway, listener: str, *flights: str) -> list[str]:
    """Say each flight once the last was answered; the last line of each answer, the greeting first."""
    (address,) = gateway.addresses[listener]
    reader, writer = await asyncio.open_connection(address.host, address.port)
    answers = []
    try:
        async with asyncio.timeout(10):
            for flight in ("", *flights):
                writer.write(f"{flight}\r\n".encode() if flight else b"")
                while (line := (await reader.readline()).decode())[3:4] == "-":
                    pass
                answers.append(line.strip())
    finally:
        writer.close()
        await writer.wait_closed()
    return answers


ONE_MAIL: Final = ("MAIL FROM:<a@client.example>", "RCPT TO:<b@example.net>", "DATA", "Subject: x\r\n\r\nx\r\n.")


async def mails(gateway: Gateway, listener: str, answered: Callable[[], None]) -> None:
    """Send three over one connection, one behind the other; `answered` is called at the reply to each."""
    (address,) = gateway.addresses[listener]
    reader, writer = await asyncio.open_connection(address.host, address.port)
    async with asyncio.timeout(10):
        await reader.readline()
        for flight in ("HELO client.example", *ONE_MAIL, *ONE_MAIL, *ONE_MAIL):
            writer.write(f"{flight}\r\n".encode())
            reply = await reader.readline()
            if flight == ONE_MAIL[-1]:
                assert reply.startswith(b"250 ")
                answered()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("policy", ["inject", "keep", "strip"])
@pytest.mark.parametrize("mode", ["direct", "queue"])
async def test_a_disabled_sdk_lets_the_clients_trace_go_on(
    policy: str, mode: str, upstream: CapturingUpstream, tmp_path: Path
) -> None:
    fields = [f"traceparent: 00-{'1' * 32}-{'2' * 16}-01", "tracestate: a=b"]
    settings = load(
        values={
            "listener": [OPEN],
            "upstream": [{"url": upstream.url, "trace_context": policy}],
            "status": {"address": "off"},
            "delivery": {"mode": mode},
            **({"spool": {"directory": str(tmp_path / "queue")}} if mode == "queue" else {}),
        }
    )
    content = "\r\n".join([*fields, "Subject: x", "", "x", "."])
    async with Gateway(settings) as gateway:
        answers = await conversation(gateway, "open", "HELO client.example", *ONE_MAIL[:3], content)
        assert answers[-1].startswith("250 ")
        [message] = await asyncio.to_thread(upstream.wait_for_messages, 1)
    header = message.content.decode().partition("\r\n\r\n")[0].split("\r\n")
    assert [line for line in header if line.startswith("trace")] == ([] if policy == "strip" else fields)


async def test_a_scrape_counts_each_mail_that_was_answered_before(
    upstream: CapturingUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE_SECONDS", 3600)  # what is made of the second mail would wait for others
    found: list[str] = []

    async with Gateway(settings_for(upstream, OPEN)) as gateway:

        def scrape() -> None:
            page, _ = gateway.metrics("")
            found.extend(re.findall(r'^smtp_server_transactions_total.*"relayed"} (.*)$', page.decode(), re.MULTILINE))

        await mails(gateway, "open", scrape)
    assert found == ["1.0", "2.0", "3.0"]


async def test_who_takes_spans_in_this_process_has_those_of_a_mail_when_it_is_answered(
    upstream: CapturingUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_SDK_DISABLED")

    class Sink:
        def take(self, record: SpanRecord) -> None:
            names.append(record.name)

    names: list[str] = []
    counts: list[int] = []
    async with Gateway(settings_for(upstream, OPEN), span_sinks=[Sink()]) as gateway:
        await mails(gateway, "open", lambda: counts.append(names.count("smtp.transaction")))
    assert counts == [1, 2, 3]


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("broken")


def broken_at_first(method: Callable[..., Any]) -> Callable[..., Any]:
    """As `method`, but for its first call."""
    calls = iter([broken])
    return lambda *arguments, **named: next(calls, method)(*arguments, **named)


@pytest.mark.parametrize("where", ["set_up", "start", "finish", "flush_and_shutdown"])
async def test_telemetry_that_fails_at_the_start_or_the_end_stops_no_mail(
    where: str, upstream: CapturingUpstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if where == "set_up":
        monkeypatch.setattr(gateway_module, where, broken_at_first(set_up))
    else:
        monkeypatch.setattr(Telemetry, where, broken)
    async with Gateway(settings_for(upstream, OPEN)) as gateway:
        await mails(gateway, "open", lambda: None)
    [told] = [record for record in caplog.records if record.name == "otel_smtp.gateway"]
    assert told.exc_info is not None


async def test_metrics_go_on_after_an_error_in_them(
    upstream: CapturingUpstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gateway_module, "MAILS_COUNTED_SECONDS", 0.001)
    went_on = asyncio.Event()
    results = iter([broken, broken])
    monkeypatch.setattr(Telemetry, "count_mails", lambda _: next(results, went_on.set)())
    async with Gateway(settings_for(upstream, OPEN)):
        await asyncio.wait_for(went_on.wait(), 30)
    assert [record.message for record in caplog.records] == ["metrics cannot catch up; mail is unaffected"]


async def verify(name: str, token: str) -> str | None:
    return name if token == "right" else None


def xoauth2(token: str) -> str:
    return "AUTH XOAUTH2 " + base64.b64encode(f"user=app\x01auth=Bearer {token}\x01\x01".encode()).decode()


MAIL: Final = "MAIL FROM:<a@client.example>"


async def test_a_program_verifies_tokens_and_has_no_users_file(upstream: CapturingUpstream) -> None:
    settings = settings_for(upstream, BY_TOKEN, verifies_tokens=True)
    seen: list[str] = []

    def conn_state(connection: ConnectionInfo, transition: Transition) -> None:
        seen.append(str(transition.state))

    async with Gateway(settings, token_verifier=verify, conn_state=conn_state) as gateway:
        # RFC 7628 3.2.3: a refused token is told why by a challenge, which the client answers.
        wrong = await conversation(gateway, "tokens", "EHLO me", xoauth2("wrong"), "AQ==", MAIL)
        assert [answer[:3] for answer in wrong] == ["220", "250", "334", "535", "530"]
        right = await conversation(
            gateway, "tokens", "EHLO me", xoauth2("right"), MAIL, "RCPT TO:<b@there.example>", "DATA", "."
        )
        assert [answer[:3] for answer in right] == ["220", "250", "235", "250", "250", "354", "250"]
    assert len(upstream.messages) == 1
    assert seen.count("Auth") == 2


async def test_auth_without_a_users_file_needs_the_promised_token_verifier(upstream: CapturingUpstream) -> None:
    settings = settings_for(upstream, BY_TOKEN, verifies_tokens=True)
    with pytest.raises(ValueError, match="listener 'tokens' has AUTH, but neither a users file nor a token verifier"):
        Gateway(settings)


@pytest.mark.parametrize(
    ("first_octets", "states", "reason"),
    [
        (b"", "New StartTLS Closed", CloseReason.CLIENT_DISCONNECT),
        (b"\x16\x03\x01", "New StartTLS Error Closed", CloseReason.TLS_FAILURE),
        (b"EHLO me\r\n", "New StartTLS Error Closed", CloseReason.TLS_FAILURE),
    ],
)
async def test_a_health_check_of_a_port_with_implicit_tls_is_no_failed_handshake(
    first_octets: bytes, states: str, reason: CloseReason, upstream: CapturingUpstream, tmp_path: Path
) -> None:
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    files = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "cert.pem")}
    closed: asyncio.Queue[ConnectionRecord] = asyncio.Queue()

    class Closed(Observer):
        def connection_closed(self, connection: ConnectionRecord) -> None:
            closed.put_nowait(connection)

    settings = settings_for(upstream, OPEN | files | {"tls": "implicit"})
    async with Gateway(settings, observers=[Closed()]) as gateway:
        (address,) = gateway.addresses["open"]
        _, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(first_octets)
        writer.close()
        async with asyncio.timeout(10):
            connection = await closed.get()
        assert " ".join(one.state for one in connection.transitions) == states
        assert (connection.end.reason, connection.end.octets_received) == (reason, 0)


@pytest.mark.parametrize("table", ["upstream", "notify"])
async def test_authorities_that_cannot_be_used_are_refused_at_start_and_at_a_reload(
    table: str, upstream: CapturingUpstream, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    tables: dict[str, Any] = {
        "upstream": {"name": "mine", "url": f"smtp+starttls://127.0.0.1:{upstream.port}"},
        "notify": {"name": "mine", "url": "https://127.0.0.1:9/", "key": "a key of thirty-two octets, here"},
    }
    tables[table]["ca_file"] = str(tmp_path / "ca.pem")
    settings = load(
        values={name: [one] for name, one in tables.items()}
        | {"delivery": {"mode": "queue"}, "spool": {"directory": str(tmp_path / "spool")}},
        listen=["127.0.0.1:0"],
        flags=[assignment("status.address=off")],
    )
    async with Gateway(settings) as gateway:
        (tmp_path / "ca.pem").write_text("no certificate\n")
        with pytest.raises(CertificateError, match=f"cannot use the TLS files of .*: ca_file {tmp_path}/ca.pem: no "):
            gateway.reload(settings)
    with pytest.raises(CertificateError, match=f"ca_file {tmp_path}/ca.pem: no certificate"):
        Gateway(settings)


def test_no_module_takes_the_place_of_a_name_that_programs_import() -> None:
    # A submodule, once imported, is an attribute of its package: `load` was one, and no function any more.
    modules = {path.stem for path in Path(otel_smtp.__file__).parent.iterdir()}
    assert modules.isdisjoint(otel_smtp.__all__)


def test_the_packages_docstring_names_what_there_is() -> None:
    names = re.findall(r"`([a-z]+(?:\.[A-Za-z]+)*)`", otel_smtp.__doc__ or "")
    assert len(names) > 8
    for name in names:
        if name != "conn_state":
            assert pkgutil.resolve_name(f"otel_smtp.{name}") is not None, name


def test_garbage_collection_leaves_out_what_start_up_made() -> None:
    thresholds = gc.get_threshold()
    try:
        leave_out_of_garbage_collection()
        assert gc.get_freeze_count() > 1000
        assert len(gc.get_objects()) < 1000
        assert gc.isenabled()
        assert gc.get_threshold()[0] > thresholds[0]
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)


# Starts that fail -----------------------------------------------------------------------------------------------------


async def test_a_status_port_that_is_taken_ends_the_start_and_leaves_nothing_open(upstream: CapturingUpstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {
            "listener": [{"address": ["127.0.0.1:0"]}],
            "upstream": [{"url": upstream.url}],
            "status": {"address": f"127.0.0.1:{taken.getsockname()[1]}"},
        }
        gateway = Gateway(load(values=values))
        with pytest.raises(CannotListen, match="address already in use") as told:
            await gateway.start()
    assert told.value.setting == "status.address (settings)"
    (address,) = gateway.addresses["local"]
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(address.host, address.port)
    await gateway.stop(immediately=True)


async def refuses(address: Endpoint) -> bool:
    """Whether nobody listens there any more."""
    try:
        _, writer = await asyncio.open_connection(address.host, address.port)
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False  # it was just being closed
    writer.close()
    return False


async def test_who_has_just_connected_gets_a_mail_through_when_a_successor_takes_over(
    upstream: CapturingUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "NEWCOMERS_SECONDS", 3600.0)
    async with Gateway(settings_for(upstream, OPEN)) as gateway:
        (address,) = gateway.addresses["open"]
        reader, writer = await asyncio.open_connection(address.host, address.port)
        leaving = asyncio.create_task(gateway.leave_ports())
        async with asyncio.timeout(60):
            while not await refuses(address):
                pass
        writer.write(b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nBDAT 1 LAST\r\nxQUIT\r\n")
        async with asyncio.timeout(60):
            said = await reader.read()
        assert re.findall(rb"(?m)^(\d{3}) ", said) == [b"220", b"250", b"250", b"250", b"250", b"221"]
        assert len(upstream.messages) == 1
        assert not leaving.done()
        leaving.cancel()
        writer.close()


async def test_the_status_port_is_left_before_the_listeners_when_a_successor_takes_over(
    upstream: CapturingUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds new listeners alone finds a page of their gateway alone."""
    monkeypatch.setattr(gateway_module, "NEWCOMERS_SECONDS", 0.0)
    values = {
        "listener": [OPEN],
        "upstream": [{"url": upstream.url}],
        "status": {"address": f"127.0.0.1:{unclaimed_port()}"},
    }
    async with Gateway(load(values=values)) as gateway:
        (address,) = gateway.addresses["open"]
        leave, accepted_then = StatusPort.stop, []

        async def noted(self: StatusPort) -> None:
            await leave(self)
            accepted_then.append(not await refuses(address))

        with monkeypatch.context() as patched:
            patched.setattr(StatusPort, "stop", noted)
            await gateway.leave_ports()
        assert accepted_then == [True]
        assert await refuses(address)
