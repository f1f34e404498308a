"""Every name that leaves is in the registry, every name of the registry leaves, and nothing that is private does.

One eventful visit - TLS, AUTH of each mechanism, mail, refusals - with a canary in each input is played to a gateway of
each `addresses` mode. What an OTLP receiver got and what was logged is then searched for the canaries, and compared
with `telemetry/attributes.py`, from which the README's tables are made.
"""

import base64
import contextlib
import smtplib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import scramp

from otel_smtp.server.users import users_line
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import On
from tests.end_to_end.conftest import Files
from tests.end_to_end.test_traces import QUICKLY
from tests.support.capture import KEYWORDS, CapturingUpstream
from tests.support.dialogue import UpstreamScript, scripted_reply
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.support.process import GatewayProcess, gateway

USER: Final = "canaryuser"
PASSWORD: Final = "canarypassword"
WRONG: Final = "canarywrong"
SENDER: Final = "canarysender@canaryfrom.example"
RECIPIENT: Final = "canaryrcpt@canaryto.example"
REFUSED: Final = "canaryrefused@canaryto.example"
HELO: Final = "canaryhelo.example"
TOKEN: Final = base64.b64encode(f"user={USER}\x01auth=Bearer canarytoken\x01\x01".encode()).decode()
MESSAGE: Final = (
    "Message-ID: <canaryid@canaryfrom.example>\r\nBaggage: canary=baggage\r\nTracestate: canary=state\r\n"
    "Subject: canarysubject\r\nX-Canary: canaryheader\r\n\r\ncanarybody\r\n"
)

DOMAINS: Final = {HELO, "canaryfrom.example", "canaryto.example"}
IN_FULL: Final = DOMAINS | {SENDER, RECIPIENT, REFUSED, USER}
# What each mode shows, and with it nothing else of the visit.
SHOWN: Final = {"domain": DOMAINS, "none": set[str](), "hash": set[str](), "full": IN_FULL}


class BehindProxy(smtplib.SMTP):
    """A client whose balancer names it."""

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connected = socket.create_connection((host, port), timeout)
        connected.sendall(b"PROXY TCP4 192.0.2.9 198.51.100.1 40000 25\r\n")
        return connected


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def authenticate_by_scram(client: smtplib.SMTP, password: str) -> int:
    scram = scramp.ScramClient(["SCRAM-SHA-256"], USER, password)
    code, challenge = client.docmd("AUTH", f"SCRAM-SHA-256 {encoded(scram.get_client_first())}")
    assert code == 334
    scram.set_server_first(base64.b64decode(challenge).decode())
    code, challenge = client.docmd(encoded(scram.get_client_final()))
    if code == 334:
        code, _ = client.docmd("")
    return code


def visit(client: smtplib.SMTP, files: Files) -> None:
    """All that a client can say, with a canary in each of it."""
    client.docmd("CANARYVERB", "canaryargument")
    client.ehlo(HELO)
    client.docmd("VRFY", "canaryvrfy@canaryto.example")
    client.docmd("AUTH", f"PLAIN {encoded(f'{chr(0)}{USER}{chr(0)}canaryclear')}")
    client.starttls(context=files.client_context())
    client.ehlo(HELO)
    for mechanism in ("XOAUTH2", "OAUTHBEARER", "CANARYMECHANISM"):
        assert client.docmd("AUTH", f"{mechanism} {TOKEN}")[0] == 504
    assert client.docmd("AUTH", f"PLAIN {encoded(f'{chr(0)}{USER}{chr(0)}{WRONG}')}")[0] == 535
    assert client.docmd("AUTH", "LOGIN")[0] == 334
    assert client.docmd(encoded(USER))[0] == 334
    assert client.docmd(encoded(WRONG))[0] == 535
    assert authenticate_by_scram(client, WRONG) == 535
    assert authenticate_by_scram(client, PASSWORD) == 235
    client.docmd("MAIL", "FROM:<canarybad")
    assert client.docmd("MAIL", f"FROM:<{SENDER}> BODY=8BITMIME")[0] == 250
    client.docmd("RSET")
    for expected in (250, 554):
        assert client.docmd("MAIL", f"FROM:<{SENDER}>")[0] == 250
        assert client.docmd("RCPT", f"TO:<{REFUSED}>")[0] == 550
        assert client.docmd("RCPT", f"TO:<{RECIPIENT}>")[0] == 250
        assert client.data(MESSAGE)[0] == expected
    client.quit()


def visit_by(mechanism: str, client: smtplib.SMTP, files: Files) -> None:
    """A login by a mechanism that sends the password itself."""
    client.starttls(context=files.client_context())
    client.ehlo(HELO)
    if mechanism == "PLAIN":
        assert client.docmd("AUTH", f"PLAIN {encoded(f'{chr(0)}{USER}{chr(0)}{PASSWORD}')}")[0] == 235
    else:
        assert client.docmd("AUTH", f"LOGIN {encoded(USER)}")[0] == 334
        assert client.docmd(encoded(PASSWORD))[0] == 235
    client.quit()


@dataclass(frozen=True)
class Played:
    """What came of the visit."""

    mode: str
    receiver: OtlpReceiver
    running: GatewayProcess

    @property
    def emitted(self) -> bytes:
        """All that left: exports, as they were on the wire, and the log."""
        return b"\n".join([*self.receiver.bodies, self.running.stderr.encode()])


def play(mode: str, files: Files, directory: Path, running: contextlib.ExitStack) -> Played:
    script = UpstreamScript(
        # DATA is an event where there is no BDAT.
        lacks=frozenset({"CHUNKING"} if mode == "none" else ()),
        recipients={REFUSED: scripted_reply(f"550 5.1.1 <{REFUSED}> unknown")},
        content=(
            scripted_reply(f"250 2.0.0 queued for {RECIPIENT}"),
            scripted_reply(f"554 5.7.1 {SENDER} may not send to <{RECIPIENT}>"),
        ),
    )
    upstream = running.enter_context(
        CapturingUpstream(script, keywords=(*KEYWORDS, "AUTH PLAIN"), tls=files.server_context("localhost"))
    )
    receiver = running.enter_context(OtlpReceiver(with_grpc=False))
    users = directory / "users"
    users.write_text(users_line(USER, PASSWORD, scram=True) + "\n", encoding="utf-8")
    users.chmod(0o600)
    is_proxied = mode == "full"
    settings = {
        **files.listener("starttls"),
        "listener.auth_users_file": str(users),
        "upstream.url": f"smtp+starttls://localhost:{upstream.port}",
        "upstream.ca_file": files.ca_file,
        "upstream.username": "canaryupstreamuser",
        "upstream.password": "canaryupstreampassword",
        "upstream.limits": ["provider-rate"],
        "limit.name": "provider-rate",
        "limit.rate": "2/s",
        "telemetry.addresses": mode,
        "telemetry.state_events": "both",
        "limits.auth_failures": 20,
        "limits.auth_failures_per_minute": 100,
        "telemetry.segment_events": 16,
        "telemetry.probes": True,
        "log.level": "debug",
        **({"telemetry.addresses_hash_key": "canarykey"} if mode == "hash" else {}),
        **({"listener.proxy_protocol_from": ["127.0.0.0/8"]} if is_proxied else {}),
    }
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint, **QUICKLY}
    process = running.enter_context(gateway(settings, directory, environ=environ))
    connect = BehindProxy if is_proxied else smtplib.SMTP
    visit(connect("127.0.0.1", process.port, timeout=15), files)
    for mechanism in ("PLAIN", "LOGIN"):
        visit_by(mechanism, connect("127.0.0.1", process.port, timeout=15), files)
    connect("127.0.0.1", process.port, timeout=15).close()  # a probe
    assert process.stop() == 0
    assert len(upstream.messages) == 2
    return Played(mode, receiver, process)


@pytest.fixture(scope="module")
def played(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Played]]:
    with contextlib.ExitStack() as running:
        yield {mode: play(mode, files, tmp_path_factory.mktemp(mode), running) for mode in SHOWN}


def canaries_in(text: str) -> list[str]:
    """The words with a canary, or with one that is in base64 at any offset."""
    low = text.lower()
    found = [word for word in ("canary", "canary"[::-1]) if word in low]
    for offset in range(3):
        # The octets of base64 that the canary alone decides, whatever stands before and behind it.
        whole = base64.b64encode(b"\0" * offset + b"canary" + b"\0" * (-(offset + 6) % 3)).decode()
        start, end = -(-offset * 8 // 6), (offset + 6) * 8 // 6
        if whole[start:end] in text:
            found.append(whole[start:end])
    return found


def test_the_search_finds_a_canary_in_any_guise() -> None:
    for secret in (f"\0{USER}\0x", f"ab{PASSWORD}", f"a{USER}b", PASSWORD):
        assert canaries_in(encoded(secret)), secret
    assert canaries_in("x CANARYverb")
    assert canaries_in(encoded("somebody else") + " yellow bird") == []


@pytest.mark.xdist_group("registry")
@pytest.mark.parametrize("mode", SHOWN)
def test_each_mode_shows_what_it_says_and_nothing_else(mode: str, played: dict[str, Played]) -> None:
    emitted = played[mode].emitted.decode("utf-8", "replace")
    assert [shown for shown in SHOWN[mode] if shown not in emitted] == []
    # The longest first: an address is taken away before its domain.
    for shown in sorted(SHOWN[mode], key=len, reverse=True):
        emitted = emitted.replace(shown, "")
    at = emitted.lower().find("canary")
    assert canaries_in(emitted) == [], emitted[max(0, at - 200) : at + 100]


# Names ------------------------------------------------------------------------------------------------------------

SPAN_OF: Final = {
    names.SPAN_CONNECTION: On.CONNECTION,
    names.SPAN_TRANSACTION: On.TRANSACTION,
    names.SPAN_DELIVERY: On.DELIVERY,
}
# In the registry, and on none of these spans: tests/spool and tests/telemetry/test_tracing.py have them. What happens
# in a queue without an attempt is in test_stories.py.
NOT_IN_THE_VISIT: Final = {
    (names.SPOOL_ID, On.TRANSACTION): "queue mode",
    (names.SPOOL_ID, On.DELIVERY): "queue mode",
    (names.POSSIBLE_DUPLICATE, On.DELIVERY): "queue mode",
    (names.TAKEN_OVER_FROM, On.PHASE): "a queue of several gateways: tests/spool/postgresql",
    (names.TAKEN_OVER_SILENT, On.PHASE): "a queue of several gateways: tests/spool/postgresql",
    (names.MESSAGE_ID, On.TRANSACTION): "opted in by telemetry.message_id",
    (names.ERROR_TYPE, On.CONNECTION): "a failure of ours",
    **{
        (names.SAMPLING_REASON, on): "kept by outcome: test_keeping.py"
        for on in (On.CONNECTION, On.TRANSACTION, On.DELIVERY)
    },
    **{(names.FAILURE_REASON, on): "test_stories.py" for on in (On.CONNECTION, On.TRANSACTION, On.DELIVERY, On.STATE)},
    (names.RECIPIENTS_NOT_SHOWN, On.RECIPIENT): "more than fifty refused recipients: test_recipients.py",
    (names.ERROR_TYPE, On.TRANSACTION): "a failure of ours: this upstream refuses",
}


def spans_of(played: dict[str, Played]) -> list[ReceivedSpan]:
    return [span for one in played.values() for span in one.receiver.spans]


# An event says on what span it is; its attributes are of one of these kinds.
EVENT_ATTRIBUTES: Final = {On.CONNECTION: On.STATE, On.TRANSACTION: On.RECIPIENT, On.DELIVERY: On.PHASE}


def emitted_attributes(played: dict[str, Played]) -> set[tuple[str, On]]:
    found = set()
    for span in spans_of(played):
        found |= {(name, SPAN_OF[span.name]) for name in span.attributes}
        for event in span.events:
            found |= {(name, EVENT_ATTRIBUTES[names.EVENTS[event.name].on]) for name in event.attributes}
        found |= {(name, On.LINK) for link in span.links for name in link.attributes}
    return found


@pytest.mark.xdist_group("registry")
def test_spans_and_events_are_those_of_the_registry(played: dict[str, Played]) -> None:
    spans = spans_of(played)
    assert {span.name for span in spans} == set(SPAN_OF)
    assert {event.name for span in spans for event in span.events} == set(names.EVENTS) - {names.TAKEN_OVER_EVENT}
    assert {span.scope for span in spans} == {names.SCOPE_NAME}
    assert sum(span.dropped for span in spans) == 0


@pytest.mark.xdist_group("registry")
def test_attributes_are_those_of_the_registry_where_it_says(played: dict[str, Played]) -> None:
    emitted = emitted_attributes(played)
    told = {
        (attribute.name, on)
        for attribute in names.ATTRIBUTES.values()
        for on in attribute.on
        if on not in (On.METRIC, On.LOG)
    }
    assert emitted - told == set()
    assert {(name, on) for name, on in told - emitted if on is not On.SPOOL} == set(NOT_IN_THE_VISIT)


_PYTHON: Final = {
    names.Type.STRING: str,
    names.Type.INT: int,
    names.Type.DOUBLE: float,
    names.Type.BOOLEAN: bool,
    names.Type.STRINGS: list,
}


@pytest.mark.xdist_group("registry")
def test_values_have_the_type_that_the_registry_says(played: dict[str, Played]) -> None:
    pairs: list[tuple[str, Any]] = []
    for span in spans_of(played):
        pairs += span.attributes.items()
        pairs += [pair for event in span.events for pair in event.attributes.items()]
        pairs += [pair for link in span.links for pair in link.attributes.items()]
    wrong = {name: value for name, value in pairs if type(value) is not _PYTHON[names.ATTRIBUTES[name].type]}
    assert wrong == {}


@pytest.mark.xdist_group("registry")
def test_the_access_log_has_registered_fields_only(played: dict[str, Played]) -> None:
    lines = [line for one in played.values() for line in one.running.log if line["event"].startswith("smtp.")]
    assert {line["event"] for line in lines} >= {*SPAN_OF, *names.STATE_EVENTS.values()}
    assert {field for line in lines for field in line} <= {*names.ATTRIBUTES, *names.LOG_FIELDS}


@pytest.mark.xdist_group("registry")
def test_metrics_are_those_of_the_registry_with_its_labels(played: dict[str, Played]) -> None:
    metrics = [metric for one in played.values() for metric in one.receiver.metrics]
    emitted = {(metric.name, label) for metric in metrics for point in metric.points for label in point.attributes}
    assert emitted <= {(metric.name, label) for metric in names.METRICS.values() for label in metric.labels}
    assert {metric.unit for metric in metrics} <= {metric.unit for metric in names.METRICS.values()}
    # Queue mode and connections that are refused or lost are not part of the visit.
    spool = {names.SPOOL_MESSAGES.name, names.SPOOL_AGE.name, names.SPOOL_DEAD.name}
    spool |= {
        one.name
        for one in (
            names.SPOOL_GATEWAYS, names.SPOOL_AWAY, names.SPOOL_TAKEN_OVER, names.SPOOL_STALE, names.SPOOL_UNANSWERED,
            names.SPOOL_STORE, names.SPOOL_GROUP_SIZE, names.SPOOL_POSSIBLE_DUPLICATES,
        )
    }  # fmt: skip
    told = {names.NOTIFY_OUTCOMES.name, names.NOTIFY_PENDING.name, names.NOTIFY_AGE.name}
    missing = set(names.METRICS) - {metric.name for metric in metrics} - spool - told
    assert missing <= {names.REFUSED.name, names.TELEMETRY_DROPPED.name}
