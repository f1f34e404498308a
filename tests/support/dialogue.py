r"""Dialogues: what a client says and what the gateway answers, as text that anyone can read and add to.

A file ``tests/dialogues/SUBJECT.smtp`` holds dialogues, each under a line ``== its name``. A line is blank, a comment
(``#``), or one of these:

Before anything is said
    ``set limits.recipients = 2``        a setting by its name in the settings file, with a TOML value
    ``only: in memory``                  not run over a socket; a comment says why
    ``upstream: content 451 4.3.0 No``   the upstream's reply at one point: ``mail``, ``rcpt ADDRESS`` or ``content``.
                                         Several for one point hold for the first, second ... time; then all is well
    ``upstream lacks: SMTPUTF8 DSN``     extensions that the upstream does not offer; ``SIZE 1000`` limits its size

What is said, in order
    ``C: NOOP``             the client's line; CRLF is added. All client lines in a row are one segment: pipelining
    ``C= NOOP\r\nQU``       the client's octets as they are, with escapes (below)
    ``C~ end``              the client sends no more, but reads (half close)
    ``C~ close``            the client is gone
    ``C~ handshake``        the client shakes hands; ``C~ handshake fails``: it does so wrongly
    ``G~ refuse``           the gateway is full, at accept; ``G~ shutdown``: it shuts down; ``G~ timeout``: it gives up
    ``S: 250 2.1.0 *``      one whole reply; ``*`` stands for anything. The lines of a reply of several lines are joined
                            by `` | ``, with the code once: ``250 gateway.example | PIPELINING | *``
    ``S! *STARTTLS*``       the reply just matched must not look like this
    ``S~ close``            the gateway closes the connection

What is left
    ``states: New Active Closed``             every recorded state, in order
    ``closed: quit``                          why the connection ended
    ``envelope: a@x.example > b@x.example``   the envelope of the first, second ... message that was taken
    ``content: Subject: x\r\n\r\nHello\r\n``  the content of the first, second ... message, below our own header field

Escapes: ``\r \n \t \0 \\ \xHH``, and ``\{2000*a\r\n}`` for 2000 times ``a\r\n``.

Replies must come when they are expected, neither earlier nor later, and nothing may come that is not.
"""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from otel_smtp.smtp.extensions import EXTENSIONS, Extensions
from otel_smtp.smtp.replies import EnhancedStatus, ErrorType, Reply

DIRECTORY: Final = Path(__file__).resolve().parent.parent / "dialogues"

CLIENT_ACTS: Final = ("end", "close", "handshake", "handshake fails")
GATEWAY_ACTS: Final = ("refuse", "shutdown", "timeout")

_ESCAPE = re.compile(r"\\(?:(?P<simple>[rnt0\\])|x(?P<hex>[0-9a-fA-F]{2})|\{(?P<times>\d+)\*(?P<text>[^{}]*)\})")
_SIMPLE: Final = {"r": b"\r", "n": b"\n", "t": b"\t", "0": b"\0", "\\": b"\\"}


class BadDialogue(ValueError):
    """A dialogue file breaks its own grammar."""


@dataclass(frozen=True, slots=True)
class Say:
    """The client sends these octets in one segment."""

    octets: bytes
    line: int


@dataclass(frozen=True, slots=True)
class Expect:
    """One reply that must come; `never` are patterns that it must not match."""

    pattern: str
    line: int
    never: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Act:
    """Something that is not said: one of `CLIENT_ACTS` or `GATEWAY_ACTS`."""

    what: str
    line: int


@dataclass(frozen=True, slots=True)
class ServerCloses:
    """The gateway closes the connection."""

    line: int


Step = Say | Expect | Act | ServerCloses


@dataclass(frozen=True, slots=True)
class UpstreamScript:
    """What the upstream says other than yes.

    Attributes:
        mail, content: replies for the first, second ... time.
        recipients: the reply to each recipient with this address.
        lacks: keywords that it does not offer.
        size: its SIZE limit in octets, None where it has none.
    """

    mail: tuple[Reply, ...] = ()
    content: tuple[Reply, ...] = ()
    recipients: dict[str, Reply] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    size: int | None = None

    def offered(self) -> Extensions:
        """What can be offered on behalf of it."""
        fields: dict[str, Any] = {row.field: row.keyword not in self.lacks for row in EXTENSIONS if row.is_relayed}
        return Extensions(**{**fields, "chunking": True, "size": self.size})


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One dialogue, as the module's head describes it."""

    name: str
    file: str
    line: int
    settings: dict[str, Any]  # "limits.recipients": 2
    only_in_memory: bool
    upstream: UpstreamScript
    steps: tuple[Step, ...]
    states: tuple[str, ...]
    closed: str | None
    envelopes: tuple[str, ...]
    contents: tuple[bytes, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    def where(self, step: Step) -> str:
        """The step's place, for people."""
        return f"{self.file}.smtp:{step.line}"


def unescape(text: str) -> bytes:
    r"""The octets that `text` stands for.

    Raises:
        BadDialogue: a backslash begins nothing known.
    """
    octets = bytearray()
    position = 0
    while (at := text.find("\\", position)) >= 0:
        octets += text[position:at].encode()
        match = _ESCAPE.match(text, at)
        if match is None:
            raise BadDialogue(f"unknown escape: {text[at : at + 8]!r}")
        if match["simple"]:
            octets += _SIMPLE[match["simple"]]
        elif match["hex"]:
            octets.append(int(match["hex"], 16))
        else:
            octets += unescape(match["text"]) * int(match["times"])
        position = match.end()
    return bytes(octets + text[position:].encode())


def matches(pattern: str, reply: str) -> bool:
    """Whether a reply, as `joined` writes it, fits `pattern`."""
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), reply, re.DOTALL) is not None


def joined(lines: list[str]) -> str:
    """A reply's lines as one: the code once, the texts separated by " | "."""
    return f"{lines[0][:3]} {' | '.join(line[4:] for line in lines)}"


class ReplyReader:
    """Cuts a server's octets into replies, each as `joined` writes it."""

    def __init__(self) -> None:
        self._held = b""
        self._lines: list[str] = []

    def feed(self, data: bytes) -> list[str]:
        """The replies that `data` completes.

        Raises:
            AssertionError: the octets are no replies, or the lines of one reply differ in their code.
        """
        *lines, self._held = (self._held + data).split(b"\r\n")
        replies = []
        for line in lines:
            text = line.decode("ascii")
            assert re.fullmatch(r"[2-5]\d\d[ -][\x20-\x7e]*", text), f"no reply line: {text!r}"
            assert not self._lines or self._lines[0][:3] == text[:3], f"code changes in a reply: {text!r}"
            self._lines.append(text)
            if text[3] == " ":
                replies.append(joined(self._lines))
                self._lines = []
        return replies

    @property
    def is_between_replies(self) -> bool:
        """Whether all that came are whole replies."""
        return not self._held and not self._lines


def scripted_reply(text: str) -> Reply:
    """A reply of the upstream, from a dialogue's "451 4.3.0 Try later"."""
    code, _, rest = text.partition(" ")
    enhanced, rest = EnhancedStatus.parse(rest)
    number = int(code)
    return Reply(number, enhanced, (rest,), ErrorType.UPSTREAM_REFUSED if number >= 400 else None)


class _Reader:
    """Reads one dialogue, line by line."""

    def __init__(self, file: str, name: str, line: int) -> None:
        self.file = file
        self.name = name
        self.line = line
        self.settings: dict[str, Any] = {}
        self.only_in_memory = False
        self.mail: list[Reply] = []
        self.content: list[Reply] = []
        self.recipients: dict[str, Reply] = {}
        self.lacks: frozenset[str] = frozenset()
        self.size: int | None = None
        self.steps: list[Step] = []
        self.states: tuple[str, ...] = ()
        self.closed: str | None = None
        self.envelopes: list[str] = []
        self.contents: list[bytes] = []

    def read(self, text: str, number: int) -> None:
        key, separator, value = text.partition(" ")
        value = value if key in ("C:", "C=") else value.strip()
        match key:
            case "set":
                name, _, given = value.partition(" = ")
                self.settings[name] = tomllib.loads(f"value = {given}")["value"]
            case "only:":
                if value != "in memory":
                    raise BadDialogue(f"only: {value}")
                self.only_in_memory = True
            case "upstream:":
                self._read_upstream(*value.split(" ", 1))
            case "upstream" if value.startswith("lacks: "):
                self._read_lacks(value.removeprefix("lacks: "))
            case "C:":
                self._say(value.encode() + b"\r\n", number)
            case "C=":
                self._say(unescape(value), number)
            case "C~" if value in CLIENT_ACTS:
                self.steps.append(Act(value, number))
            case "G~" if value in GATEWAY_ACTS:
                self.steps.append(Act(value, number))
            case "S:":
                self.steps.append(Expect(value, number))
            case "S!" if self.steps and isinstance(self.steps[-1], Expect):
                last = self.steps[-1]
                self.steps[-1] = Expect(last.pattern, last.line, (*last.never, value))
            case "S~" if value == "close":
                self.steps.append(ServerCloses(number))
            case "states:":
                self.states = tuple(value.split())
            case "closed:":
                self.closed = value
            case "envelope:":
                self.envelopes.append(value)
            case "content:":
                self.contents.append(unescape(value))
            case _:
                raise BadDialogue(f"{key}{separator}{value}")

    def _say(self, octets: bytes, number: int) -> None:
        if self.steps and isinstance(self.steps[-1], Say):
            last = self.steps[-1]
            self.steps[-1] = Say(last.octets + octets, last.line)
        else:
            self.steps.append(Say(octets, number))

    def _read_upstream(self, point: str, rest: str) -> None:
        match point:
            case "mail":
                self.mail.append(scripted_reply(rest))
            case "content":
                self.content.append(scripted_reply(rest))
            case "rcpt":
                address, _, reply = rest.partition(" ")
                self.recipients[address] = scripted_reply(reply)
            case _:
                raise BadDialogue(f"upstream: {point}")

    def _read_lacks(self, text: str) -> None:
        words = text.split()
        if "SIZE" in words:
            at = words.index("SIZE")
            self.size = int(words[at + 1])
            del words[at : at + 2]
        self.lacks = frozenset(words)

    def dialogue(self) -> Dialogue:
        if not self.steps or self.states[:1] != ("New",) or self.states[-1:] != ("Closed",):
            raise BadDialogue(f"{self.file}.smtp:{self.line}: {self.name!r} lacks its steps or its states")
        return Dialogue(
            self.name,
            self.file,
            self.line,
            self.settings,
            self.only_in_memory,
            UpstreamScript(tuple(self.mail), tuple(self.content), self.recipients, self.lacks, self.size),
            tuple(self.steps),
            self.states,
            self.closed,
            tuple(self.envelopes),
            tuple(self.contents),
        )


def parse(text: str, file: str) -> list[Dialogue]:
    """The dialogues of one file's text; `file` is its name without suffix.

    Raises:
        BadDialogue: with the line.
    """
    readers: list[_Reader] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("== "):
            readers.append(_Reader(file, line[3:].strip(), number))
            continue
        if not readers:
            raise BadDialogue(f"{file}.smtp:{number}: a line before the first name")
        try:
            readers[-1].read(line, number)
        except (BadDialogue, ValueError) as error:
            raise BadDialogue(f"{file}.smtp:{number}: {line!r}: {error}") from error
    return [reader.dialogue() for reader in readers]


def load() -> list[Dialogue]:
    """All dialogues of the directory, in order of file and line.

    Raises:
        BadDialogue: in a file, or two dialogues of one file with one name.
    """
    dialogues = [
        dialogue
        for path in sorted(DIRECTORY.glob("*.smtp"))
        for dialogue in parse(path.read_text(encoding="utf-8"), path.stem)
    ]
    names = [str(dialogue) for dialogue in dialogues]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadDialogue(f"named twice: {sorted(twice)}")
    return dialogues
