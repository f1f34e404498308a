"""Every dialogue of tests/dialogues against the real process: real sockets, real TLS, a capturing upstream, and the
states read from the spans that an OTLP receiver got.

Dialogues with the same settings share one gateway, and are run in one worker (the group) where tests are shared out.
"""

import contextlib
import json
import smtplib
import socket
import ssl
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trustme

from otel_smtp.server.users import users_line
from tests.support.capture import CapturedMessage, CapturingUpstream
from tests.support.dialogue import Act, Dialogue, Expect, ReplyReader, Say, ServerCloses, Step, load, matches
from tests.support.engine import PASSWORD, USER
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.support.process import GatewayProcess, gateway

SECONDS: Final = 15.0
DIALOGUES: Final = [dialogue for dialogue in load() if not dialogue.only_in_memory]


def group_of(dialogue: Dialogue) -> str:
    """Dialogues with the same one can share a gateway."""
    lacks = sorted(dialogue.upstream.lacks), dialogue.upstream.size
    return json.dumps([sorted(dialogue.settings.items()), *lacks])


class Site:
    """A gateway for one group of dialogues, its upstream and its OTLP receiver."""

    def __init__(self, running: GatewayProcess, upstream: CapturingUpstream, receiver: OtlpReceiver) -> None:
        self.port = running.port
        self.upstream = upstream
        self._receiver = receiver

    def connection_span(self, client_port: int) -> ReceivedSpan:
        """The span of the connection that came from `client_port`."""

        def found(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
            return [
                span
                for span in spans
                if span.name == "smtp.connection" and span.attributes.get("client.port") == client_port
            ]

        return found(self._receiver.wait_for_spans(lambda spans: bool(found(spans))))[-1]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Sites:
    """One site at a time: the tests come in the order of their groups."""

    def __init__(self, authority: trustme.CA, directory: Path) -> None:
        self._authority = authority
        self._directory = directory
        self._group = ""
        self._open = contextlib.ExitStack()
        self._site: Site | None = None
        self._count = 0

    def site(self, dialogue: Dialogue) -> Site:
        """The site of the dialogue's group."""
        if self._site is None or self._group != group_of(dialogue):
            self.close()
            self._site = self._build(dialogue)
            self._group = group_of(dialogue)
        return self._site

    def close(self) -> None:
        """Stop what runs."""
        self._site = None
        self._open.close()

    def _build(self, dialogue: Dialogue) -> Site:
        self._count += 1
        directory = self._directory / str(self._count)
        directory.mkdir()
        upstream = self._open.enter_context(CapturingUpstream(dialogue.upstream))
        receiver = self._open.enter_context(OtlpReceiver(with_grpc=False))
        running = self._open.enter_context(
            gateway(
                {**self._settings(dialogue.settings, directory), "upstream.url": upstream.url},
                directory,
                environ={
                    "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
                    "OTEL_BSP_SCHEDULE_DELAY": "20",
                },
            )
        )
        if dialogue.upstream.lacks or dialogue.upstream.size:
            # What the upstream offers is learnt from its EHLO.
            with smtplib.SMTP("127.0.0.1", running.port) as client:
                client.sendmail("warm@up.example", ["warm@up.example"], "")
        return Site(running, upstream, receiver)

    def _settings(self, given: dict[str, Any], directory: Path) -> dict[str, Any]:
        plain = {"upstream.trace_context": "strip", "telemetry.trace_in_reply": False}
        settings = {**plain, "telemetry.probes": True, **given}
        if settings.get("listener.tls", "off") != "off":
            certificate = self._authority.issue_cert("gateway.example", "127.0.0.1")
            certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
            for number, blob in enumerate(certificate.cert_chain_pems):
                blob.write_to_path(str(directory / "cert.pem"), append=number > 0)
            settings |= {"listener.tls_cert": "cert.pem", "listener.tls_key": "key.pem"}
        if settings.get("listener.auth", "off") != "off":
            users = directory / "users"
            users.write_text(users_line(USER, PASSWORD) + "\n", encoding="utf-8")
            users.chmod(0o600)
            settings["listener.auth_users_file"] = "users"
        return settings


@pytest.fixture(scope="module")
def sites(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    built = Sites(authority, tmp_path_factory.mktemp("sites"))
    yield built
    built.close()


class SocketRun:
    """Plays one dialogue over a socket."""

    def __init__(self, dialogue: Dialogue, site: Site, authority: trustme.CA) -> None:
        self._dialogue = dialogue
        self._site = site
        self._tls = ssl.create_default_context()
        authority.configure_trust(self._tls)
        self._reader = ReplyReader()
        self._replies: deque[str] = deque()
        self._has_ended = False
        self._has_left = False

    def play(self) -> None:
        """Play it to its end.

        Raises:
            AssertionError: the gateway did not do what the dialogue says.
        """
        upstream = self._site.upstream
        upstream.say(self._dialogue.upstream)
        before = len(upstream.messages)
        connected = socket.create_connection(("127.0.0.1", self._site.port), SECONDS)
        client_port = connected.getsockname()[1]
        with contextlib.ExitStack() as closing:
            self._socket = connected
            closing.callback(lambda: self._socket.close())
            for step in self._dialogue.steps:
                self._do(step, self._dialogue.where(step))
            if not self._has_left and not self._has_ended:
                self._socket.shutdown(socket.SHUT_WR)
                self._read_to_end(str(self._dialogue))
        self._judge(self._site.connection_span(client_port), upstream.messages[before:])
        assert upstream.violations == []

    def _judge(self, span: ReceivedSpan, messages: list[CapturedMessage]) -> None:
        dialogue = self._dialogue
        states = tuple(event.attributes["smtp.state"] for event in span.events if "smtp.state" in event.attributes)
        assert states == dialogue.states
        assert span.dropped == 0
        if dialogue.closed is not None:
            assert span.attributes["smtp.close.reason"] == dialogue.closed
        taken = [message for message in messages if message.is_taken]
        assert [message.addresses for message in taken] == [without_parameters(one) for one in dialogue.envelopes]
        for message, content in zip(taken, dialogue.contents, strict=bool(dialogue.contents)):
            assert message.below_received == content

    def _do(self, step: Step, where: str) -> None:
        match step:
            case Say(octets):
                self._socket.sendall(octets)
            case Expect(pattern, never=never):
                reply = self._next_reply(where, pattern)
                assert matches(pattern, reply), f"{where}: got {reply}, expected {pattern}"
                assert not any(matches(unwanted, reply) for unwanted in never), f"{where}: got {reply}"
            case Act(what):
                self._act(what)
            case ServerCloses():
                self._read_to_end(where)

    def _act(self, what: str) -> None:
        match what:
            case "close":
                self._socket.close()
                self._has_left = True
            case "end":
                self._socket.shutdown(socket.SHUT_WR)
            case "handshake":
                self._socket = self._tls.wrap_socket(self._socket, server_hostname="gateway.example")
            case "handshake fails":
                self._socket.sendall(b"\x16\x03\x01\x00\x05no TLS" + bytes(200))
                self._reader = ReplyReader()
                with contextlib.suppress(ConnectionResetError):
                    while self._socket.recv(4096):
                        pass
                self._has_ended = True

    def _next_reply(self, where: str, pattern: str) -> str:
        while not self._replies:
            data = self._socket.recv(65536)
            assert data, f"{where}: closed, expected {pattern}"
            self._replies.extend(self._reader.feed(data))
        return self._replies.popleft()

    def _read_to_end(self, where: str) -> None:
        if not self._has_ended:
            # A connection that is closed with octets of ours unread is reset.
            with contextlib.suppress(ConnectionResetError):
                while data := self._socket.recv(65536):
                    self._replies.extend(self._reader.feed(data))
            self._has_ended = True
        assert not self._replies, f"{where}: unexpected {self._replies}"


def without_parameters(envelope: str) -> str:
    """A dialogue's envelope with the addresses alone: the gateway has a mind of its own about SIZE and BODY."""
    words = envelope.split(" ")
    return " ".join(word for word in words if word not in ("SMTPUTF8", "REQUIRETLS") and not is_parameter(word))


def is_parameter(word: str) -> bool:
    return word.startswith(("SIZE=", "BODY=", "RET=", "ENVID=", "AUTH=", "NOTIFY=", "ORCPT="))


@pytest.mark.long
@pytest.mark.parametrize(
    "dialogue",
    [
        pytest.param(dialogue, id=str(dialogue), marks=pytest.mark.xdist_group(f"site {group_of(dialogue)}"))
        for dialogue in sorted(DIALOGUES, key=group_of)
    ],
)
def test_dialogue_against_the_process(dialogue: Dialogue, sites: Sites, authority: trustme.CA) -> None:
    SocketRun(dialogue, sites.site(dialogue), authority).play()
