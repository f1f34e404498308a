"""Providers as they are: what an application meets of an upstream's caps and limits; the real process, real clients."""

import asyncio
import contextlib
import smtplib
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.end_to_end.conftest import StartGateway
from tests.support.upstream import ScriptedUpstream


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
