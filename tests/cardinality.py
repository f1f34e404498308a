"""Whatever clients say, the number of metric series stays what it was.

    python -m tests.cardinality [--words 1000000] [--seed 1]

Random verbs, HELO names, addresses, domains, AUTH mechanisms, parameters and trace contexts go through a real session
into the real observers, metrics and tracing alike. The series of the metrics page are compared, after the first
sessions and after all; the exit status is 1 where one was added. `telemetry/test_metrics.py` runs a short version.
"""

import argparse
import asyncio
import ipaddress
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from otel_smtp.forwarding.base import MOST, MailTransaction, MessageAnswered, RecipientsAnswered
from otel_smtp.observing import DeliveryRecord, Endpoint, Outcome, TransactionRecord, fan_out
from otel_smtp.server.exchanges import Authenticator, Exchange, Rejected, Step, Turn
from otel_smtp.server.policy import ListenerPolicy, ServerTimeouts
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.policy import ServerLimits, ServerPolicy
from otel_smtp.telemetry.setup import Telemetry, TelemetryOptions, set_up
from tests.server.keeping import WatchedServer
from tests.support.fake_stream import FakeStream

WORDS: Final = 1_000_000
FIRST_WORDS: Final = 5_000
JUNK_VERBS: Final = 30
_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
Series = frozenset[tuple[str, tuple[tuple[str, str], ...]]]
Word = Callable[[], str]


class _Refusing(Authenticator):
    """Knows nobody."""

    def begin(self, mechanism: str, turn: Turn | None = None) -> Exchange:
        return _Refusal(mechanism)


class _Refusal:
    def __init__(self, mechanism: str) -> None:
        self.mechanism = mechanism

    async def step(self, response: bytes | None) -> Step:
        return Rejected()


_POLICY: Final = ListenerPolicy(
    "local",
    ServerPolicy(
        "gw.example.com",
        auth_mechanisms=("PLAIN",),
        auth_in_clear=True,
        limits=ServerLimits(errors=1000, junk_commands=1000),
    ),
    ServerTimeouts(),
    authenticator=_Refusing(),
    allow=(ipaddress.ip_network("0.0.0.0/0"),),
)


class _Upstream:
    """Takes every mail, and says of each what it never said before."""

    def __init__(self, word: Word) -> None:
        self._word = word

    def capabilities(self) -> Extensions:
        return MOST

    def begin(self, mail: Mail, record: TransactionRecord) -> "_Taken":
        return _Taken(record, self._word)


class _Taken(MailTransaction):
    spool_id: str | None = None

    def __init__(self, record: TransactionRecord, word: Word) -> None:
        self._record = record
        self._word = word

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        answered([replies.RECIPIENT_OK] * len(batch))

    def content(self, resume: Callable[[], None]) -> None:
        pass

    def write(self, chunk: bytes) -> bool:
        return True

    def finish(self, answered: MessageAnswered) -> None:
        now_ns = time.monotonic_ns()
        delivery = DeliveryRecord(self._record, "provider", Endpoint("upstream.example", 587), 1, now_ns)
        self._record.deliveries.append(delivery)
        delivery.pool_wait_ns = 0
        reply = replies.Reply(250, replies.OK.enhanced, (f"queued as {self._word()}",))
        delivery.end(Outcome.RELAYED, reply, None, now_ns)
        answered(reply, ())

    def abort(self) -> None:
        pass


class _House(WatchedServer):
    """A server that no client exasperates."""

    def may_authenticate(self, client: Endpoint) -> bool:
        return True

    def auth_failed(self, client: Endpoint, guesser: str = "") -> float:
        return 0.0


async def _session(server: WatchedServer, word: Word, trace_id: str) -> None:
    """One client that says what it likes."""
    stream = FakeStream()
    _, over = server.serve(_POLICY, stream)
    lines = [
        f"EHLO {word()}.example",
        *(f"{word()} {word()}" for _ in range(JUNK_VERBS)),
        f"AUTH {word()} {word()}",
        "AUTH PLAIN AGEAYg==",
        f"VRFY {word()}",
        f"MAIL FROM:<{word()}@{word()}.example> {word()}={word()}",
        f"MAIL FROM:<{word()}@{word()}.example>",
        f"RCPT TO:<{word()}@{word()}.example> {word()}={word()}",
        f"RCPT TO:<{word()}@{word()}.example>",
        "DATA",
        f"traceparent: 00-{trace_id}-{trace_id[:16]}-01",
        f"{word()}: {word()}",
        "",
        ".",
        "QUIT",
    ]
    stream.feed("".join(f"{line}\r\n" for line in lines).encode())
    await over
    assert b"\r\n354 " in stream.sent


def _series(telemetry: Telemetry) -> Series:
    text = telemetry.metrics_page("text/plain")[0].decode()
    return frozenset(
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("smtp_")
    )


async def _series_before_and_after(words: int, seed: int) -> tuple[Series, Series]:
    choose = random.Random(seed)
    said = 0

    def word() -> str:
        nonlocal said
        said += 1
        return "".join(choose.choices(_LETTERS, k=8))

    telemetry = set_up(TelemetryOptions(access_log=False), {})
    server = _House(_Upstream(word), fan_out(telemetry.observers))

    async def say(until: int) -> Series:
        while said < until:
            await _session(server, word, f"{choose.getrandbits(128) | 1:032x}")
        return _series(telemetry)

    return await say(min(FIRST_WORDS, words // 4)), await say(words)


def series_before_and_after(words: int, *, seed: int = 1) -> tuple[Series, Series]:
    """The series of the page after some sessions, and after so many that `words` random words were said."""
    return asyncio.run(_series_before_and_after(words, seed))


def main() -> int:
    """Run, and tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.cardinality")
    parser.add_argument("--words", type=int, default=WORDS)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    before, after = series_before_and_after(arguments.words, seed=arguments.seed)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{arguments.words} words: {len(before)} series before, {len(after)} after; {seconds:.0f} s, {peak:.0f} MiB")
    for added in sorted(after - before):
        print("added:", *added)
    return 0 if after == before else 1


if __name__ == "__main__":
    sys.exit(main())
