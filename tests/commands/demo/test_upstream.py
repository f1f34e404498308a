"""The upstream that keeps what arrives, over real sockets."""

import asyncio
import smtplib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import pytest
import pytest_asyncio

from otel_smtp.commands.demo.upstream import REFUSED_ADDRESS, KeepingForwarder, KeepingUpstream
from otel_smtp.observing import Endpoint, TransactionRecord
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import Reply
from tests.support.waiting import until

T = TypeVar("T")
MESSAGE = b"Subject: x\r\n\r\n.dot\r\nHello\r\n"


@pytest.fixture
def forwarder() -> KeepingForwarder:
    return KeepingForwarder()


@pytest_asyncio.fixture
async def address(forwarder: KeepingForwarder) -> AsyncIterator[Endpoint]:
    upstream = KeepingUpstream(forwarder)
    yield await upstream.start()
    await upstream.stop()


async def with_client(address: Endpoint, use: Callable[[smtplib.SMTP], T]) -> T:
    def run() -> T:
        with smtplib.SMTP(address.host, address.port or 0, timeout=10) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def test_mail_is_kept_octet_for_octet(forwarder: KeepingForwarder, address: Endpoint) -> None:
    await with_client(address, lambda client: client.sendmail("a@example.org", ["b@example.net"], MESSAGE))
    (kept,) = forwarder.kept
    assert kept.mail.reverse_path == "a@example.org"
    assert [recipient.address for recipient in kept.recipients] == ["b@example.net"]
    assert kept.content.startswith(b"Received: ")
    assert kept.content.endswith(MESSAGE)


async def test_the_refused_recipient_gets_550_and_the_other_has_it(
    forwarder: KeepingForwarder, address: Endpoint
) -> None:
    refused = await with_client(
        address, lambda client: client.sendmail("a@example.org", [REFUSED_ADDRESS.upper(), "b@example.net"], MESSAGE)
    )
    assert refused == {REFUSED_ADDRESS.upper(): (550, b"5.1.1 No such user here")}
    assert [recipient.address for recipient in forwarder.kept[0].recipients] == ["b@example.net"]


async def test_the_oldest_mail_is_forgotten() -> None:
    forwarder = KeepingForwarder()
    answers: list[Reply] = []
    for number in range(105):
        mail = Mail(f"{number}@example.org")
        transaction = forwarder.begin(mail, TransactionRecord(mail, 1, None, 0, 0))
        transaction.recipients([Recipient("b@example.net")], answers.extend)
        transaction.content(lambda: None)
        transaction.write(MESSAGE)
        transaction.finish(lambda reply, verdicts: answers.append(reply))
    await until(lambda: len(answers) == 210)
    assert {answer.code for answer in answers} == {250}
    assert len(forwarder.kept) == 100
    assert forwarder.kept[0].mail.reverse_path == "5@example.org"
