"""Octet fidelity: what a client sends reaches the upstream unchanged below our field, in every mode and by every way.

The messages are of our own making: shapes that mail really has, and some that it should not have but does. A signature
over a message (DKIM) holds exactly as long as its octets do.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Any, Final

import pytest

from tests.end_to_end.conftest import Client, StartGateway
from tests.end_to_end.messages import HEADER, with_attachments
from tests.support.capture import KEYWORDS, CapturingUpstream

DATA_ONLY: Final = tuple(word for word in KEYWORDS if word not in ("CHUNKING", "BINARYMIME"))
MODES: Final[dict[str, tuple[dict[str, Any], tuple[str, ...]]]] = {
    "transparent, chunks": ({}, KEYWORDS),
    "transparent, data": ({}, DATA_ONLY),
    "buffered, chunks": ({"delivery.strategy": "buffered"}, KEYWORDS),
    "buffered, data": ({"delivery.strategy": "buffered"}, DATA_ONLY),
    "queue, chunks": ({"delivery.mode": "queue"}, KEYWORDS),
    "queue, data": ({"delivery.mode": "queue"}, DATA_ONLY),
    "direct-then-queue, chunks": ({"delivery.mode": "direct-then-queue"}, KEYWORDS),
    "in two transactions": ({"upstream.recipients_per_transaction": 1}, KEYWORDS),
}


def written(content: str, **fields: str) -> bytes:
    message = EmailMessage(policy=SMTP.clone(cte_type="8bit"))
    message["From"] = "Zoë <a@client.example>"
    for name, value in fields.items():
        message[name.replace("_", "-")] = value
    message.set_content(content, charset="utf-8", cte="8bit")
    return message.as_bytes()


def signed_like() -> bytes:
    """A header block as a signer leaves it: tags over folded lines, blanks at their ends."""
    digest = hashlib.sha256(b"a body").hexdigest()
    return (
        b"DKIM-Signature: v=1; a=rsa-sha256; c=simple/simple; d=client.example;\r\n"
        b"\ts=k1; t=1767225600; h=From : To :Subject:\r\n\t Date; bh=" + digest.encode() + b"; \r\n"
        b" b=" + b"\r\n  ".join(digest[at : at + 16].encode() for at in range(0, 64, 16)) + b"\r\n" + HEADER
    )


def anything(seed: int) -> bytes:
    """Lines of whatever octets but NUL, CR and LF: blanks, dots and tabs more often than chance has them."""
    chance = random.Random(seed)
    octets = bytes([*range(1, 10), 11, 12, *range(14, 256), *b".....  \t"])
    lines = [bytes(chance.choices(octets, k=chance.choice((0, 1, 2, 3, 70, 998, 3000)))) for _ in range(60)]
    return HEADER + b"Subject: " + str(seed).encode() + b"\r\n\r\n" + b"".join(line + b"\r\n" for line in lines)


SHAPES: Final[dict[str, bytes]] = {
    "utf-8": written("Grüße\n\n. \n", Subject="Größe — 日本"),
    "attachments": with_attachments(300_000),
    "larger than is held in memory": with_attachments(1_500_000),
    "a signature": signed_like() + b"Subject:  two  blanks \r\n\r\nbody \t\r\n \r\n\r\n\r\n",
    "no body": HEADER + b"Subject: x\r\n",
    "an empty body": HEADER + b"Subject: x\r\n\r\n",
    "empty lines at both ends": HEADER + b"\r\n\r\n\r\n\r\nx\r\n\r\n\r\n",
    "no header": b"\r\njust text\r\n",
    "dots": HEADER + b"\r\n.\r\n..\r\n...\r\n.x\r\nx.\r\n\r\n.\r\n",
    "a line of 60 kB": HEADER + b"\r\n" + b"x" * 60_000 + b"\r\n",
    "fields that fold oddly": b"Subject:\r\n x\r\n\t y\r\nX-Empty:\r\nX-Blank: \r\nx-CASE : 1\r\n" + HEADER + b"\r\n",
    "a line that is no field": b"From a@client.example Thu Jan  1 00:00:00 2026\r\n" + HEADER + b"\r\nx\r\n",
    "fields twice": HEADER + HEADER + b"Received: from x by y; now\r\nReturn-Path: <>\r\nBcc: d@there.example\r\n\r\n",
    "8-bit in fields": HEADER + b"Subject: \xe4\xf6\xfc \xff\r\n\r\n\x80\xff\r\n",
    "a boundary that ends early": HEADER
    + b"Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n\r\n.\r\n--x--\r\nepilogue\r\n",
    **{f"anything {seed}": anything(seed) for seed in range(12)},
}


def by_data(client: Client, content: bytes, cuts: Iterator[int]) -> str:
    assert client.asks("DATA").startswith("354 ")
    stuffed = b"\r\n".join(b"." + line if line.startswith(b".") else line for line in content.split(b"\r\n"))
    for piece in pieces(stuffed + b".\r\n", cuts):
        client.socket.sendall(piece)
    return client.reply()


def by_chunks(client: Client, content: bytes, cuts: Iterator[int]) -> str:
    for piece in pieces(content, cuts):
        client.socket.sendall(b"BDAT %d\r\n" % len(piece) + piece)
        assert client.reply().startswith("250 ")
    return client.asks("BDAT 0 LAST")


def pieces(octets: bytes, cuts: Iterator[int]) -> Iterator[bytes]:
    while octets:
        at = next(cuts)
        yield octets[:at]
        octets = octets[at:]


def whole() -> Iterator[int]:
    while True:
        yield 1 << 30


def at_random() -> Iterator[int]:
    chance = random.Random(7)
    while True:
        yield chance.choice((1, 2, 3, 100, 5000, 70_000, 300_000))


WAYS: Final[dict[str, tuple[Callable[[Client, bytes, Iterator[int]], str], Callable[[], Iterator[int]]]]] = {
    "DATA": (by_data, whole),
    "DATA in pieces": (by_data, at_random),
    "BDAT": (by_chunks, whole),
    "BDAT in chunks": (by_chunks, at_random),
}


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_every_octet_arrives(mode: str, tmp_path: Path, start: StartGateway, connect: Callable[[int], Client]) -> None:
    more, keywords = MODES[mode]
    transactions = 2 if mode == "in two transactions" else 1
    with CapturingUpstream(keywords=keywords) as upstream:
        spool = {"spool.directory": str(tmp_path / "spool")} if "delivery.mode" in more else {}
        running = start({"upstream.url": upstream.url, "upstream.trace_context": "strip", **spool, **more})
        client = connect(running.port)
        client.opens()
        for way, (send, cuts) in WAYS.items():
            for name, content in SHAPES.items():
                before = len(upstream.messages)
                envelope = ("MAIL FROM:<a@client.example> BODY=8BITMIME", "RCPT TO:<b@there.example>")
                assert client.asks(*envelope, "RCPT TO:<c@there.example>").startswith("250 "), name
                assert send(client, content, cuts()).startswith("250 "), (way, name)
                arrived = upstream.wait_for_messages(before + transactions)[before:]
                assert [one.below_received == content for one in arrived] == [True] * transactions, (way, name)
        assert upstream.violations == []
        assert running.stop() == 0
