"""An upstream that lies: at random it refuses, vanishes, stalls, garbles its replies or says more than it was asked.

It keeps book of what it really did, by message and recipient. A message names itself by its `X-Id` field and tells its
length by `X-Octets`, so that a part is never taken for the whole.
"""

import random
import re
import socketserver
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

from tests.durability.threaded import Gone, ThreadedUpstream, read_content

Copy = tuple[str, str]
"""A message for one recipient: its id, and the address."""

STALL_SECONDS: Final = 2.5  # longer than the gateway is told to wait
GARBAGE: Final = (b"2x0 what\r\n", b"\xff\xfe\x00\r\n", b"hello?\r\n", b"999 done\r\n", b"250-more\r\n354 no\r\n")

# What it does with a message at its end, and how often in a hundred.
ENDINGS: Final = {
    "take": 78, "refuse for now": 5, "refuse for good": 3, "take and vanish": 2, "vanish": 2, "take and garble": 2,
    "garble": 2, "take, answer and vanish": 1, "take and answer slowly": 1, "take and answer twice": 1,
    "take and stall": 1, "say goodbye": 2,
}  # fmt: skip


class LyingUpstream(ThreadedUpstream):
    """Listens on a port of its own.

    Args:
        script: what it does with its first messages, of `ENDINGS`, in turn; it is honest otherwise. None: at random.

    Attributes:
        is_honest: it takes whatever it is offered.
        taken: copies, and how often it took them.
        promised: of these, for how many it said so.
        refused: copies that it refused for good.
        bounced: copies that a notice reported as failed.
        torn: ids of messages that came in part.
        traces: trace ids by message.
        said: what became of the transactions of a message, in words, for the developer who has to understand it.
    """

    def __init__(self, seed: int, script: Sequence[str] | None = None) -> None:
        super().__init__()
        self._script = list(script or ())
        self.is_honest = script is not None
        self.taken: Counter[Copy] = Counter()
        self.promised: Counter[Copy] = Counter()
        self.refused: set[Copy] = set()
        self.bounced: Counter[Copy] = Counter()
        self.torn: set[str] = set()
        self.traces: dict[str, str] = {}
        self.said: defaultdict[str, list[str]] = defaultdict(list)
        self._chance = random.Random(seed)
        self._lock = threading.Lock()

    def _happens(self, share: float) -> bool:
        with self._lock:
            return not self.is_honest and self._chance.random() < share

    def converse(self, session: socketserver.StreamRequestHandler) -> None:
        def say(text: str) -> None:
            session.wfile.write(text.encode() + b"\r\n")

        def misbehave(share: float) -> None:
            if self._happens(share):
                if self._happens(0.5):
                    session.wfile.write(self._chance.choice(GARBAGE))
                raise Gone

        misbehave(0.02)
        if self._happens(0.02):
            say("421 4.3.2 not now")
            return
        say("220 lying.example")
        sender, recipients = "", list[str]()
        while line := session.rfile.readline():
            verb = line[:4].upper()
            if verb == b"EHLO":
                misbehave(0.01)
                say("250-lying.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES")
            elif verb == b"MAIL":
                sender, recipients = line.partition(b"<")[2].partition(b">")[0].decode(), []
                misbehave(0.003)
                say("451 4.3.0 not now" if self._happens(0.01) else "250 2.1.0 ok")
            elif verb == b"RCPT":
                address = line.partition(b"<")[2].partition(b">")[0].decode()
                misbehave(0.003)
                if self._happens(0.02):
                    reply = "450 4.2.1 busy"
                elif sender and self._happens(0.02):  # a notice that is refused for good is nobody's any more
                    self.refused.add((address.rpartition("-")[0], address))
                    reply = "550 5.1.1 nobody"
                else:
                    recipients.append(address)
                    reply = "250 2.1.5 ok"
                self.said[address.rpartition("-")[0]].append(f"{address}: {reply}")
                say(reply)
            elif verb == b"DATA":
                if not recipients:
                    say("554 5.5.1 no recipients")
                    continue
                misbehave(0.003)
                if self._happens(0.01):
                    say("451 4.3.0 not now")
                    continue
                say("354 go on")
                content = read_content(session)
                self._end(session, sender, recipients, content)
                sender, recipients = "", []
            elif verb == b"QUIT":
                say("221 2.0.0 bye")
                return
            else:
                say("250 2.0.0 ok")

    def _end(
        self, session: socketserver.StreamRequestHandler, sender: str, recipients: list[str], content: bytes
    ) -> None:
        with self._lock:
            endings = self._chance.choices(list(ENDINGS), weights=list(ENDINGS.values()), k=1)
            ending = self._script.pop(0) if self._script else "take" if self.is_honest else endings[0]
            if not sender and ending == "refuse for good":
                ending = "refuse for now"
            garbage = self._chance.choice(GARBAGE)
            copies = self._copies(sender, recipients, content, ending)
            if ending == "refuse for good":
                self.refused.update(copies)
            if ending in ("take", "take, answer and vanish", "take and answer slowly", "take and answer twice"):
                self.promised.update(copies)
        write = session.wfile.write
        match ending:
            case "refuse for now":
                write(b"451 4.3.0 not now\r\n")
            case "refuse for good":
                write(b"550 5.7.1 never\r\n")
            case "take and vanish" | "vanish":
                raise Gone
            case "take and garble" | "garble":
                write(garbage)
            case "take, answer and vanish":
                write(b"250 2.0.0 taken\r\n")
                raise Gone
            case "take and answer slowly":
                for octet in b"250 2.0.0 taken\r\n":
                    write(bytes([octet]))
            case "take and answer twice":
                write(b"250 2.0.0 taken\r\n250 2.0.0 and again\r\n")
            case "take and stall":
                time.sleep(STALL_SECONDS)
                write(b"250 2.0.0 taken\r\n")
            case "say goodbye":
                write(b"421 4.3.2 going down\r\n")
                raise Gone
            case _:
                write(b"250 2.0.0 taken\r\n")

    def _copies(self, sender: str, recipients: list[str], content: bytes, ending: str) -> list[Copy]:
        """Note what came; the copies that it is about."""
        is_taken = ending.startswith("take")
        found = re.search(rb"^X-Id: (\S+)\r$", content, re.MULTILINE)
        one = found[1].decode() if found is not None else ""
        self.said[one].append(f"{ending} from <{sender}>")
        if not sender:
            if is_taken and b"\r\nAction: failed\r\n" in content:
                for address in re.findall(rb"^Final-Recipient: rfc822;\s*(\S+)\r$", content, re.MULTILINE):
                    self.bounced[one, address.decode()] += 1
            return []
        octets = re.search(rb"^X-Octets: (\d+)\r$", content, re.MULTILINE)
        if is_taken and (octets is None or len(content.partition(b"\r\n\r\n")[2]) != int(octets[1])):
            self.torn.add(one)
        trace = re.search(rb"^traceparent: 00-([0-9a-f]{32})-", content, re.MULTILINE | re.IGNORECASE)
        if trace is not None:
            self.traces[one] = trace[1].decode()
        copies = [(one, address) for address in recipients]
        if is_taken:
            self.taken.update(copies)
        return copies
