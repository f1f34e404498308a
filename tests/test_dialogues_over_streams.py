"""Every dialogue of tests/dialogues on a real `Session`, over a stream in memory.

What the engine did alone it must do here too: the same replies and states, with the session's own decisions,
deadlines and batches in between.
"""

import asyncio
import ipaddress
import re
import ssl
from collections import deque
from typing import Final

import pytest

from otel_smtp.observing import TlsInfo
from otel_smtp.server.exchanges import Authenticator
from otel_smtp.server.policy import ListenerPolicy, ServerTimeouts
from otel_smtp.server.users import Users
from tests.server.keeping import WatchedServer
from tests.support.clock import advance
from tests.support.dialogue import Act, Dialogue, Expect, ReplyReader, Say, ServerCloses, Step, load, matches
from tests.support.engine import PASSWORD, USER, policy_from
from tests.support.fake_stream import FakeStream
from tests.support.known_password import KnownPassword
from tests.support.recording import RecordingObserver
from tests.support.scripted_forwarder import ScriptedForwarder

DIALOGUES: Final = load()
SECONDS: Final = 10.0


class HandshakingStream(FakeStream):
    """A stream whose handshake waits for the dialogue's."""

    def __init__(self) -> None:
        super().__init__()
        self.handshake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_shaking_hands = False
        self.begun = asyncio.Event()

    async def wait_for_input(self) -> bool:
        self.is_shaking_hands = True
        self.begun.set()
        await asyncio.wait([self.handshake])  # the dialogue's client says nothing else first
        return True

    async def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        timeout_seconds: float,
        from_first_octet: bool = False,
    ) -> TlsInfo:
        self.is_shaking_hands = True
        self.begun.set()
        await self.handshake
        self.is_shaking_hands = False
        return await super().start_tls(context, server_side=server_side, timeout_seconds=timeout_seconds)


@pytest.fixture(scope="module")
def users() -> Users:
    return Users({USER: KnownPassword(PASSWORD)})


class StreamRun:
    """Plays one dialogue on a `Session`."""

    def __init__(self, dialogue: Dialogue, users: Users) -> None:
        self._dialogue = dialogue
        policy = policy_from(dialogue.settings)
        self._stream = HandshakingStream()
        self._forwarder = ScriptedForwarder(dialogue.upstream)
        self._observer = RecordingObserver()
        self._server = WatchedServer(self._forwarder, self._observer, connections=0 if self._acts("refuse") else 100)
        self._policy = ListenerPolicy(
            "local",
            policy,
            ServerTimeouts(),
            tls_context=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
            authenticator=Authenticator(users) if policy.auth_mechanisms else None,
            allow=(ipaddress.ip_network("0.0.0.0/0"),),
        )
        self._reader = ReplyReader()
        self._replies: deque[str] = deque()

    def _acts(self, what: str) -> bool:
        return any(isinstance(step, Act) and step.what == what for step in self._dialogue.steps)

    async def play(self) -> None:
        """Play it to its end.

        Raises:
            AssertionError: the connection did not do what the dialogue says.
        """
        if isinstance(first := self._dialogue.steps[0], Say):
            self._stream.feed(first.octets)  # before the greeting
        self._session, ended = self._server.serve(self._policy, self._stream)
        try:
            for step in self._dialogue.steps if not isinstance(first, Say) else self._dialogue.steps[1:]:
                await self._do(step, self._dialogue.where(step), ended)
            if not any(isinstance(step, ServerCloses) for step in self._dialogue.steps):
                assert self._acts("close") or not ended.done(), f"{self._dialogue}: the gateway closes"
                self._stream.feed_eof()
            async with asyncio.timeout(SECONDS):
                await asyncio.wait([ended])
        finally:
            self._session.cancel()
            await asyncio.wait([ended])
        self._collect()
        assert not self._replies or self._acts("close"), f"{self._dialogue}: unexpected {self._replies}"
        self._judge()

    def _judge(self) -> None:
        dialogue = self._dialogue
        (record,), (reason,) = self._observer.records, self._observer.reasons
        record.wire += b"".join(self._stream.writes)
        record.check()
        assert record.states == dialogue.states
        assert dialogue.closed in (None, reason)
        assert record.transitions[-1].reason == reason
        messages = self._forwarder.messages
        assert tuple(message.envelope for message in messages) == dialogue.envelopes
        for message, content in zip(messages, dialogue.contents, strict=bool(dialogue.contents)):
            added = message.content.removesuffix(content)
            assert len(added) + len(content) == len(message.content)
            assert re.fullmatch(rb"Received: [^\n]*\n(?:[ \t][^\n]*\n)*", added)

    async def _do(self, step: Step, where: str, ended: "asyncio.Future[None]") -> None:
        match step:
            case Say(octets):
                self._stream.feed(octets)
            case Expect(pattern, never=never):
                reply = await self._next_reply(where, pattern, ended)
                assert matches(pattern, reply), f"{where}: got {reply}, expected {pattern}"
                assert not any(matches(unwanted, reply) for unwanted in never), f"{where}: got {reply}"
            case Act(what):
                await self._act(what, ended)
            case ServerCloses():
                async with asyncio.timeout(SECONDS):
                    await asyncio.wait([ended])
                self._collect()
                assert not self._replies, f"{where}: unexpected {self._replies}"

    async def _next_reply(self, where: str, pattern: str, ended: "asyncio.Future[None]") -> str:
        self._collect()
        async with asyncio.timeout(SECONDS):
            while not self._replies:
                assert not ended.done(), f"{where}: closed, expected {pattern}"
                await asyncio.sleep(0)
                self._collect()
        return self._replies.popleft()

    def _collect(self) -> None:
        sent, self._stream.sent = self._stream.sent, b""
        self._replies.extend(self._reader.feed(sent))

    async def _act(self, what: str, ended: "asyncio.Future[None]") -> None:
        stream = self._stream
        match what:
            case "end" | "close":
                stream.feed_eof()
            case "handshake" | "handshake fails":
                async with asyncio.timeout(SECONDS):
                    await stream.begun.wait()
                if what == "handshake":
                    stream.handshake.set_result(None)
                else:
                    stream.handshake.set_exception(ssl.SSLError("no shared cipher"))
            case "shutdown":
                self._server.is_draining = True
                self._session.drain()
            case "timeout":
                for _ in range(5):  # what was said before is taken first
                    await asyncio.sleep(0)
                advance(ServerTimeouts().data)


@pytest.mark.movable_clock
@pytest.mark.parametrize("dialogue", DIALOGUES, ids=str)
async def test_dialogue_over_a_stream(dialogue: Dialogue, users: Users) -> None:
    await StreamRun(dialogue, users).play()
