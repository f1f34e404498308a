"""Whatever clients say, the number of metric series stays what it was.

    python -m tests.cardinality [--words 1000000] [--seed 1]

Random verbs, HELO names, addresses, domains, AUTH mechanisms, parameters and trace contexts go through the real engine
into the real observers, metrics and tracing alike. The series of the metrics page are compared, after the first
sessions and after all; the exit status is 1 where one was added. `telemetry/test_metrics.py` runs a short version.
"""

import argparse
import random
import resource
import sys
import time
from collections.abc import Callable
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from otel_smtp.observing import ConnectionInfo, Endpoint, Observer, Outcome, TraceHeaders, TransactionObserver
from otel_smtp.smtp import replies
from tests.support.events import (
    AuthRequested,
    AuthResponded,
    ConnectionEnding,
    ContentEnded,
    Event,
    HeaderReceived,
    HelloReceived,
    MailRequested,
    RecipientRequested,
    TransactionAborted,
    Wait,
)
from otel_smtp.smtp.extensions import Offer
from otel_smtp.smtp.server import ServerLimits, ServerPolicy, ServerProtocol
from otel_smtp.smtp.states import CloseReason, TlsMode, raise_illegal
from otel_smtp.telemetry.setup import Telemetry, TelemetryOptions, set_up

WORDS: Final = 1_000_000
FIRST_WORDS: Final = 5_000
JUNK_VERBS: Final = 30
_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_POLICY: Final = ServerPolicy(
    "gw.example.com",
    auth_mechanisms=("PLAIN",),
    auth_in_clear=True,
    limits=ServerLimits(errors=1000, junk_commands=1000),
)
Series = frozenset[tuple[str, tuple[tuple[str, str], ...]]]


class _Session:
    """One client that says what it likes, and what stands around the engine."""

    def __init__(self, observer: Observer, word: Callable[[], str], trace_id: str) -> None:
        self._word = word
        self._trace_id = trace_id
        info = ConnectionInfo(word(), Endpoint("192.0.2.7", 40000), Endpoint("127.0.0.1", 2525), "local")
        self._seen = observer.connection_opened(info)
        offer = Offer()
        self._engine = ServerProtocol(
            _POLICY,
            self._seen.conn_state,
            offer=lambda: offer,
            on_reply=self._seen.replied,
            on_illegal=raise_illegal,
        )
        self._transaction: TransactionObserver | None = None

    def run(self) -> None:
        """Say it all."""
        engine, word = self._engine, self._word
        engine.accepted(TlsMode.OFF)
        engine.greet()
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
            f"traceparent: 00-{self._trace_id}-{self._trace_id[:16]}-01",
            f"{word()}: {word()}",
            "",
            ".",
            "QUIT",
        ]
        for line in lines:
            engine.receive_data(f"{line}\r\n".encode())
            while not isinstance(event := engine.next_event(), Wait):
                self._handle(event)
            engine.data_to_send()
        engine.closed(CloseReason.QUIT)
        self._seen.closed(CloseReason.QUIT, octets_received=2000, octets_sent=2000)

    def _handle(self, event: Event) -> None:
        engine = self._engine
        match event:
            case HelloReceived(verb, name):
                self._seen.hello(verb, name)
            case AuthRequested(mechanism):
                self._seen.auth_failed(mechanism)
                engine.reply(replies.AUTH_FAILED)
            case MailRequested(mail):
                engine.reply(replies.SENDER_OK)
                self._transaction = self._seen.transaction_begun(mail, engine.transactions)
            case RecipientRequested(recipient):
                engine.reply(replies.RECIPIENT_OK)
                self._told.recipient_answered(recipient, replies.RECIPIENT_OK)
            case HeaderReceived():
                self._told.header_received(TraceHeaders((f"00-{self._trace_id}-{'b' * 16}-01",)), message_id=None)
            case ContentEnded(octets):
                self._relay(octets)
            case TransactionAborted(reply):
                self._told.ended(Outcome.ABORTED, reply)
            case AuthResponded() | ConnectionEnding():
                pass

    @property
    def _told(self) -> TransactionObserver:
        assert self._transaction is not None
        return self._transaction

    def _relay(self, octets: int) -> None:
        told = self._told
        told.content_received(octets)
        delivery = told.delivery_begun("provider", Endpoint("upstream.example", 587))
        delivery.pooled(wait_seconds=0.0, reused=True)
        reply = replies.Reply(250, replies.OK.enhanced, (f"queued as {self._word()}",))
        delivery.ended(Outcome.RELAYED, reply, round_trips=1)
        told.ended(Outcome.RELAYED, replies.OK)
        self._engine.reply(replies.OK)


def _series(telemetry: Telemetry) -> Series:
    text = telemetry.metrics_page("text/plain")[0].decode()
    return frozenset(
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("smtp_")
    )


def series_before_and_after(words: int, *, seed: int = 1) -> tuple[Series, Series]:
    """The series of the page after some sessions, and after so many that `words` random words were said."""
    choose = random.Random(seed)
    said = 0

    def word() -> str:
        nonlocal said
        said += 1
        return "".join(choose.choices(_LETTERS, k=8))

    telemetry = set_up(TelemetryOptions(access_log=False), {})

    def say(until: int) -> Series:
        while said < until:
            _Session(telemetry.observer, word, f"{choose.getrandbits(128) | 1:032x}").run()
        return _series(telemetry)

    return say(min(FIRST_WORDS, words // 4)), say(words)


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
