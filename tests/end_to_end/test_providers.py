"""Providers as they are: what an application meets of an upstream's caps and limits; the real process, real clients."""

import asyncio
import contextlib
import json
import smtplib
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from tests.end_to_end.conftest import StartGateway
from tests.support import nodemailer
from tests.support.tools import run
from tests.support.upstream import EXTENSIONS, ScriptedUpstream


@contextlib.contextmanager
def in_thread(upstream: ScriptedUpstream) -> Iterator[ScriptedUpstream]:
    """An upstream that serves while the test blocks."""
    serving = threading.Event()
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        async with upstream:
            serving.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert serving.wait(10)
        yield upstream
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def sent_by_threads(port: int, *, threads: int, mails: int) -> Counter[str]:
    """What clients that all begin at once are told, each on a connection of its own for a few mails."""
    together = threading.Barrier(threads)

    def send(_: int) -> list[str]:
        told = []
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
            together.wait(30)
            for _ in range(mails // threads):
                try:
                    client.sendmail("a@client.example", ["b@there.example"], "Subject: x\r\n\r\nHello\r\n")
                    told.append("sent")
                except smtplib.SMTPException as error:
                    told.append(repr(error))
        return told

    with ThreadPoolExecutor(threads) as clients:
        return Counter(one for told in clients.map(send, range(threads)) for one in told)


@pytest.mark.parametrize("workers", [1, 2])
def test_twenty_clients_lose_no_mail_to_an_upstream_that_takes_three_connections(
    workers: int, start: StartGateway
) -> None:
    with in_thread(ScriptedUpstream(most_connections=3)) as upstream:
        running = start({"upstream.url": f"smtp://127.0.0.1:{upstream.port}", "workers": workers})
        for _ in range(2):
            assert sent_by_threads(running.port, threads=20, mails=60) == {"sent": 60}
        assert len(upstream.kept) == 120
        assert running.stop() == 0


# What applications see ----------------------------------------------------------------------------------------

SENDER: Final = "a@client.example"
DJANGO: Final = Path(__file__).with_name("django_send.py")


def by_smtplib(port: int, recipients: Sequence[str], file: Path) -> str | None:
    with smtplib.SMTP("127.0.0.1", port, timeout=30) as client:
        try:
            refused = client.sendmail(SENDER, recipients, file.read_bytes())
        except smtplib.SMTPException as error:
            return str(error)
    return str(refused) if refused else None


def by_django(port: int, recipients: Sequence[str], file: Path) -> str | None:
    done = subprocess.run(
        [sys.executable, str(DJANGO), str(port), *recipients], capture_output=True, text=True, timeout=60, check=False
    )
    return None if (done.returncode, done.stdout) == (0, "sent 1\n") else done.stdout + done.stderr


def by_nodemailer(port: int, recipients: Sequence[str], file: Path) -> str | None:
    done = nodemailer.send({"host": "127.0.0.1", "port": port}, SENDER, recipients, file)
    if done.returncode != 0:
        return done.stderr
    rejected = json.loads(done.stdout)["rejected"]
    return str(rejected) if rejected else None


def by_curl(port: int, recipients: Sequence[str], file: Path) -> str | None:
    words = [word for recipient in recipients for word in ("--mail-rcpt", recipient)]
    url = f"smtp://127.0.0.1:{port}/client.example"
    done = run("curl", "--verbose", "--show-error", url, "--mail-from", SENDER, *words, "--upload-file", str(file))
    return None if done.returncode == 0 else str(done.stderr)


APPLICATIONS: Final[dict[str, Callable[[int, Sequence[str], Path], str | None]]] = {
    "smtplib": by_smtplib,
    "Django": by_django,
    "nodemailer": by_nodemailer,
    "curl": by_curl,
}
SEVEN: Final = [f"r{number}@there.example" for number in range(7)]
VERDICTS: Final = {
    "refused": (b"550 5.1.1 no such user\r\n", "no such user", "550"),
    "deferred": (b"450 4.2.0 greylisted\r\n", "greylisted", "451"),
}
either_strategy = pytest.mark.parametrize("strategy", ["transparent", "buffered"])


@pytest.fixture
def message(tmp_path: Path) -> Path:
    file = tmp_path / "message.eml"
    file.write_bytes(b"From: <a@client.example>\r\nSubject: Hello\r\n\r\nHello\r\n")
    return file


def reached(upstream: ScriptedUpstream) -> list[str]:
    """Who got a mail since this was asked last."""
    addresses = sorted(address for kept in upstream.kept for address in kept.addresses)
    upstream.kept.clear()
    return addresses


@pytest.mark.parametrize(
    "limit",
    [
        {"most_recipients": 5},
        {"most_recipients_a_connection": 5},
        {"extensions": [*EXTENSIONS, "LIMITS RCPTMAX=5"]},
    ],
    ids=["of a transaction", "of a connection", "announced"],
)
@either_strategy
def test_no_application_loses_a_recipient_to_what_an_upstream_takes_at_once(
    limit: dict[str, Any], strategy: str, start: StartGateway, message: Path
) -> None:
    with in_thread(ScriptedUpstream(**limit)) as upstream:
        running = start({"upstream.url": f"smtp://127.0.0.1:{upstream.port}", "delivery.strategy": strategy})
        for name, application in APPLICATIONS.items():
            assert (name, application(running.port, SEVEN, message)) == (name, None)
            assert reached(upstream) == SEVEN
        assert running.stop() == 0


@either_strategy
def test_no_application_loses_a_recipient_to_a_route(strategy: str, start: StartGateway, message: Path) -> None:
    recipients = ["a@one.example", "b@two.example", "c@one.example"]
    with in_thread(ScriptedUpstream()) as one, in_thread(ScriptedUpstream()) as two:
        first = {"upstream.url": f"smtp://127.0.0.1:{one.port}", "upstream.recipients": ["*@one.example"]}
        second = {
            "OTELSMTP_UPSTREAM__1__URL": f"smtp://127.0.0.1:{two.port}",
            "OTELSMTP_UPSTREAM__1__RECIPIENTS": "*@two.example",
        }
        running = start({**first, "delivery.strategy": strategy}, second)
        for name, application in APPLICATIONS.items():
            assert (name, application(running.port, recipients, message)) == (name, None)
            assert (reached(one), reached(two)) == (["a@one.example", "c@one.example"], ["b@two.example"])
        assert running.stop() == 0


@pytest.mark.parametrize("verdict", VERDICTS)
@either_strategy
def test_every_application_hears_of_a_recipient_who_is_lost_in_a_further_transaction(
    verdict: str, strategy: str, start: StartGateway, message: Path
) -> None:
    said, words, code = VERDICTS[verdict]
    with in_thread(
        ScriptedUpstream(
            verdict=lambda address: said if address == SEVEN[-1] else None,
            extensions=[*EXTENSIONS, "LIMITS RCPTMAX=5"],
        )
    ) as upstream:
        running = start({"upstream.url": f"smtp://127.0.0.1:{upstream.port}", "delivery.strategy": strategy})
        for name, application in APPLICATIONS.items():
            told = application(running.port, SEVEN, message)
            assert told is not None, name
            assert code in told, name
            assert words in told, name
            assert "taken for 6 of 7 recipients" in told, name
            assert reached(upstream) == SEVEN[:-1]
        assert running.stop() == 0
