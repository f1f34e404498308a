"""Inputs to begin with: the dialogues for the server, and a few typical ones for each other target."""

import re
from collections.abc import Iterator
from typing import Final

from otel_smtp.config.settings import SCHEMA, Key
from tests.fuzz.targets import MAX_INPUT_OCTETS
from tests.support.dialogue import Act, Dialogue, Say, load
from tests.support.engine import policy_from

_V2: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_ACTS: Final = {
    "end": b"e",
    "close": b"g",
    "handshake": b"h",
    "handshake fails": b"f",
    "shutdown": b"s",
    "timeout": b"t",
    "refuse": b"h",
}
_GREETED: Final = (
    b"220 up.example\r\n\xff250-up.example\r\n250-PIPELINING\r\n250-SIZE 1000\r\n250-CHUNKING\r\n250-DSN\r\n"
    b"250-SMTPUTF8\r\n250-8BITMIME\r\n250-STARTTLS\r\n250 AUTH PLAIN LOGIN\r\n\xff"
)
_REST: Final[dict[str, tuple[bytes, ...]]] = {
    "proxy": (
        b"\x01PROXY TCP4 192.0.2.1 192.0.2.2 1025 25\r\nEHLO x\r\n",
        b"\x01PROXY TCP6 2001:db8::1 ::ffff:192.0.2.2 1025 25\r\n",
        b"\x01PROXY UNKNOWN\r\n",
        b"\x0a" + _V2 + b"\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x02\x04\x01\x00\x19EHLO x\r\n",
        b"\x0a" + _V2 + b"\x21\x21\x00\x24" + b"\x20" * 32 + b"\x04\x01\x00\x19",
        b"\x0a" + _V2 + b"\x21\x31\x00\xd8" + b"/run/a".ljust(108, b"\0") + b"/run/b".ljust(108, b"\0"),
        b"\x0a" + _V2 + b"\x20\x00\x00\x00",
    ),
    "sasl": (
        b"\x00\x00user\x00secret",
        b"\x01user\xffsecret",
        b"\x02n,,n=user,r=abcdefgh\xffc=biws,r=abcdefgh,p=AAAA",
        b"\x02r=abc,s=QSXCR+Q6sek8bf92,i=50\xffv=AAAA",
        b"\x03user=user\x01auth=Bearer token\x01\x01",
        b"\x04n,a=user,\x01host=x\x01port=25\x01auth=Bearer token\x01\x01",
        b"\x80AHVzZXIAc2VjcmV0",
    ),
    "settings": (
        b'[[upstream]]\nurl = "smtp://127.0.0.1:1025"\n',
        b'[[listener]]\naddress = ["127.0.0.1:2525"]\ntls = "off"\n[[upstream]]\nurl = "smtp://u:hunter2@h"\n',
        b'[limits]\nmessage_size = "25 MiB"\nrecipients = 10\n[delivery]\nmode = "queue"\n',
    ),
    "headers": (
        b"Received: a\r\n b\r\nTraceparent: 00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01\r\nTracestate: a=b,c=d\r\n",
        b"Message-ID: <a@b>\r\nSubject: x\r\n\ttraceparent: y\r\ntracestate : a=1\r\n",
        b"client.example\n192.0.2.1\nb@there.example",
        b'<b@there.example>: "a b"@[192.0.2.1] unknown',
    ),
}


def seeds(target: str) -> Iterator[bytes]:
    """The inputs to begin with."""
    match target:
        case "server":
            yield from filter(lambda seed: len(seed) <= MAX_INPUT_OCTETS, map(_of_dialogue, load()))
        case "client":
            yield from _client_seeds()
        case "settings":
            yield from _REST[target]
            yield from _setting_seeds()
        case _:
            yield from _REST[target]


def _of_dialogue(dialogue: Dialogue) -> bytes:
    policy = policy_from(dialogue.settings)
    tls = {"off": 0, "starttls": 1, "implicit": 3}[policy.tls_mode]
    auth = {(): 0, ("PLAIN", "LOGIN"): 48}[policy.auth_mechanisms]
    first = tls | policy.is_lmtp << 2 | policy.tls_required << 3 | auth
    first |= policy.auth_required << 6 | policy.auth_in_clear << 7
    second = policy.rejects_bare_line_ends | (2 if "limits" not in str(dialogue.settings) else 0)
    verdicts = bytes(5 if reply.is_transient else 4 for reply in dialogue.upstream.content)
    said = bytearray()
    for step in dialogue.steps:
        match step:
            case Say(octets, _):
                octets = octets.replace(b"\xff", b"\xfe")  # which would end a flight
                said += (b"\xffn" if said and not said.endswith((b"\xffh", b"\xffn")) else b"") + octets
            case Act(what, _):
                said += b"\xff" + _ACTS[what]
    return bytes([first, second]) + (b"\0\0" + verdicts + b"\0\0")[:4] + b"\x01" + bytes(said)


def _client_seeds() -> Iterator[bytes]:
    envelope = b"a@x.example\nb@y.example\nc@y.example"
    content = b"Subject: x\r\n\r\n.Hello\r\n"
    said = (
        b"250 ok\r\n\xff250 ok\r\n\xff550 5.1.1 no\r\n\xff354 go\r\n\xff250 2.0.0 done\r\n\xff221 bye\r\n",
        b"250 ok\r\n250 ok\r\n250 ok\r\n354 go\r\n\xff250 done\r\n\xff",
        b"250 ok\r\n250 ok\r\n250 ok\r\n250 chunk\r\n250 done\r\n\xff221 bye\r\n",
        b"250 ok\r\n250 ok\r\n250 ok\r\n250 done\r\n451 later\r\n\xff221 bye\r\n",
        b"220 go\r\n\xff250-up\r\n250 CHUNKING\r\n\xff250 ok\r\n\xff421 4.3.2 bye\r\n",
        b"334 VXNlcm5hbWU6\r\n\xff334 UGFzc3dvcmQ6\r\n\xff235 ok\r\n\xff250 ok\r\n\xff",
    )
    for bits, rest in ((0, 0), (64, 1), (70, 2), (2, 2), (67, 3), (6, 2), (8, 4), (16, 5), (192, 1), (32, 0)):
        yield bytes([bits, 17, len(envelope), len(content)]) + envelope + content + _GREETED + said[rest]


def _setting_seeds() -> Iterator[bytes]:
    """Every key of every table, with a value that most of them refuse: the mutator finds the others."""
    for table, entries in SCHEMA.items():
        keys = [name for name, entry in entries.items() if isinstance(entry, Key)]
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", table.__name__).lower()
        head = f"[[{name}]]" if name in ("upstream", "listener") else f"[{name}]" if name != "settings" else ""
        for start in range(0, len(keys), 8):
            lines = "".join(f"{key} = 1\n" for key in keys[start : start + 8])
            yield f"{head}\n{lines}".encode()
