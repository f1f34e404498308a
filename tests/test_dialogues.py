"""Every dialogue of tests/dialogues, on the engine: whole, octet by octet, cut at random with late answers.

Replies, states, events and content must be the same in every mode: how the network cuts the input changes nothing.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final

import pytest

from otel_smtp.smtp import replies
from otel_smtp.smtp.states import LEGAL, CloseReason, ConnState
from tests.support.dialogue import (
    Act,
    BadDialogue,
    Dialogue,
    Expect,
    Say,
    ServerCloses,
    Step,
    load,
    matches,
    parse,
    unescape,
)
from tests.support.engine import EngineDriver, Record, policy_from

DIALOGUES: Final = load()
SEEDS: Final = (1, 2, 3)

Cut = Callable[[bytes], Iterator[bytes]]


def whole(octets: bytes) -> Iterator[bytes]:
    yield octets


def octet_by_octet(octets: bytes) -> Iterator[bytes]:
    # A line of many thousand octets is cut finely at its ends, where something is decided.
    middle = octets[1000:-1000]
    yield from (octets[at : at + 1] for at in range(min(1000, len(octets))))
    if middle:
        yield middle
    yield from (octets[at : at + 1] for at in range(max(1000, len(octets) - 1000), len(octets)))


def at_random(chance: random.Random) -> Cut:
    def cut(octets: bytes) -> Iterator[bytes]:
        places = sorted(chance.randrange(len(octets) + 1) for _ in range(chance.randrange(8)))
        for start, end in zip([0, *places], [*places, len(octets)], strict=True):
            if start < end:
                yield octets[start:end]

    return cut


class EngineRun:
    """Plays one dialogue on the engine."""

    def __init__(self, dialogue: Dialogue, cut: Cut, answers_late: Callable[[], bool] = lambda: False) -> None:
        self._dialogue = dialogue
        self._cut = cut
        self._driver = EngineDriver(policy_from(dialogue.settings), dialogue.upstream, answers_late=answers_late)
        self._replies: deque[str] = deque()
        self._is_greeted = False

    def play(self) -> Record:
        """Play it to its end.

        Raises:
            AssertionError: the engine did not do what the dialogue says.
        """
        driver = self._driver
        before: Step | None = None
        for step in self._dialogue.steps:
            where = self._dialogue.where(step)
            # What the client says and its end of stream are one flight; who leaves right after speaking reads nothing.
            is_one_flight = isinstance(before, Say) and isinstance(step, Act) and step.what in ("end", "close")
            if not isinstance(step, Expect) and not is_one_flight:
                self._assert_silence(where)
            self._do(step, where)
            before = step
        self._assert_silence(f"{self._dialogue}, at its end")
        closes = any(isinstance(step, ServerCloses) for step in self._dialogue.steps)
        if not closes:
            has_left = any(isinstance(step, Act) and step.what == "close" for step in self._dialogue.steps)
            assert has_left or driver.ending is None, f"{self._dialogue}: the gateway closes"
            driver.end_of_stream()
            driver.sent()
        record = driver.closed()
        assert record.states == self._dialogue.states
        if self._dialogue.closed is not None:
            assert record.transitions[-1].reason == self._dialogue.closed
        assert tuple(message.envelope for message in record.messages) == self._dialogue.envelopes
        if self._dialogue.contents:
            assert tuple(message.content for message in record.messages) == self._dialogue.contents
        return record

    def _do(self, step: Step, where: str) -> None:
        driver = self._driver
        match step:
            case Say(octets):
                driver.feed(self._cut(octets))
            case Expect(pattern, never=never):
                self._greet_if_due()
                self._collect()
                assert self._replies, f"{where}: no reply, expected {pattern}"
                reply = self._replies.popleft()
                assert matches(pattern, reply), f"{where}: got {reply}, expected {pattern}"
                assert not any(matches(unwanted, reply) for unwanted in never), f"{where}: got {reply}"
            case Act(what):
                self._act(what)
            case ServerCloses():
                self._collect()
                assert not self._replies, f"{where}: unexpected {self._replies}"
                assert driver.ending is not None, f"{where}: the gateway does not close"

    def _act(self, what: str) -> None:
        driver = self._driver
        match what:
            case "end" | "close":
                self._greet_if_due()
                driver.end_of_stream()
                if what == "close":
                    driver.sent()
            case "handshake":
                driver.protocol.tls_started("1.3", "TLS_AES_256_GCM_SHA384")
            case "handshake fails":
                driver.protocol.tls_failed()
            case "timeout":
                driver.protocol.fail(replies.TIMED_OUT, CloseReason.TIMEOUT)
            case "shutdown":
                driver.protocol.fail(replies.SHUTTING_DOWN, CloseReason.SHUTDOWN)
            case "refuse":
                self._is_greeted = True
                driver.protocol.refuse(replies.TOO_MANY_CONNECTIONS)

    def _greet_if_due(self) -> None:
        if not self._is_greeted:
            self._is_greeted = True
            self._driver.protocol.greet()

    def _collect(self) -> None:
        self._driver.settle()
        self._replies.extend(self._driver.sent())

    def _assert_silence(self, where: str) -> None:
        self._collect()
        assert not self._replies, f"{where}: unexpected {self._replies.popleft()}"


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=str)
def test_dialogue_on_the_engine(dialogue: Dialogue) -> None:
    EngineRun(dialogue, whole).play()


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=str)
def test_dialogue_on_the_engine_octet_by_octet(dialogue: Dialogue) -> None:
    assert_same(EngineRun(dialogue, octet_by_octet).play(), EngineRun(dialogue, whole).play())


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_dialogue_on_the_engine_cut_at_random_with_late_answers(dialogue: Dialogue, seed: int) -> None:
    chance = random.Random(f"{seed} {dialogue}")
    answers_late = lambda: chance.random() < 0.7  # noqa: E731 - one chance for cuts and answers
    assert_same(EngineRun(dialogue, at_random(chance), answers_late).play(), EngineRun(dialogue, whole).play())


def assert_same(record: Record, reference: Record) -> None:
    assert record.transitions == reference.transitions
    assert record.replies == reference.replies
    assert record.events == reference.events
    assert record.messages == reference.messages


def test_every_golden_sequence_of_the_specification_is_a_dialogue() -> None:
    assert len([dialogue for dialogue in DIALOGUES if dialogue.file == "golden"]) == 12


def test_the_dialogues_walk_every_legal_step() -> None:
    walked: set[tuple[ConnState, ConnState]] = set()
    for dialogue in DIALOGUES:
        states = [transition.state for transition in EngineRun(dialogue, whole).play().transitions]
        walked.update(pairwise(states))
    legal = {(before, after) for before, following in LEGAL.items() for after in following}
    # Gone before the greeting; gone between Reset and the Active that always follows it in the same call.
    assert legal - walked == {(ConnState.NEW, ConnState.CLOSED), (ConnState.RESET, ConnState.CLOSED)}


# The runner itself: a dialogue that is wrong must fail ------------------------------------------------------------

GOOD: Final = """
== one
S: 220 *
C: NOOP
S: 250 2.0.0 *
C: QUIT
S: 221 *
S~ close
states: New Active Closed
closed: quit
"""


def play(text: str) -> None:
    (dialogue,) = parse(text, "inline")
    EngineRun(dialogue, whole).play()


def test_a_right_dialogue_passes() -> None:
    play(GOOD)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("S: 250 2.0.0 *", "S: 250 2.1.0 *"),  # another reply
        ("S: 250 2.0.0 *\n", ""),  # a reply too many
        ("S: 250 2.0.0 *", "S: 250 2.0.0 *\nS: 250 2.0.0 *"),  # a reply too few
        ("S: 250 2.0.0 *", "S: 250 2.0.0 *\nS! *Ok*"),  # a reply that must not be
        ("C: NOOP\n", "C= NOOP\\r\n"),  # a command that never ends
        ("S~ close\n", ""),  # the gateway closes, and nobody said so
        ("C: NOOP", "S~ close\nC: NOOP"),  # it does not close there
        ("New Active Closed", "New Active Error Closed"),
        ("closed: quit", "closed: timeout"),
        ("closed: quit", "closed: quit\nenvelope: a@b.example > c@d.example"),
        ("closed: quit", "closed: quit\ncontent: x"),
    ],
)
def test_a_wrong_dialogue_fails(right: str, wrong: str) -> None:
    assert right in GOOD
    with pytest.raises(AssertionError):
        play(GOOD.replace(right, wrong))


@pytest.mark.parametrize(
    "text",
    [
        "S: 220 *",  # no name
        "== one\nS: 220 *",  # no states
        "== one\nstates: New Closed",  # no steps
        "== one\nX: what\nstates: New Closed",
        "== one\nC~ sneezes\nstates: New Closed",
        "== one\nC= \\q\nstates: New Closed",
        "== one\nset limits.errors = many\nS: 220\nstates: New Closed",
        "== one\nupstream: hello 250 x\nS: 220\nstates: New Closed",
        "== one\nS! never\nS: 220\nstates: New Closed",
    ],
)
def test_a_bad_file_is_refused(text: str) -> None:
    with pytest.raises(BadDialogue):
        parse(text, "inline")


def test_escapes() -> None:
    assert unescape(r"a\r\n\t\0\\\x41\{3*x\r}é") == b"a\r\n\t\0\\Ax\rx\rx\r\xc3\xa9"


def test_a_pattern_matches_the_whole_reply() -> None:
    assert matches("250 2.0.0 *", "250 2.0.0 Ok")
    assert matches("250 * | SIZE 10 | *", "250 host | PIPELINING | SIZE 10 | DSN")
    assert not matches("250 2.0.0", "250 2.0.0 Ok")
    assert not matches("25. *", "250 x")
