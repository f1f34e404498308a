"""The forwarders' transactions call by call: callbacks, back-pressure, and what is left after an abort."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from otel_smtp.forwarding.base import MailTransaction, Transient
from otel_smtp.observing import TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, Recipient
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import Reply
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.forwarders import DirectThenQueueForwarder, SpoolForwarder
from otel_smtp.spool.intake import Intake
from otel_smtp.spool.messages import Lease, SpoolError, StorageAway, StorageBusy, StorageFull
from tests.spool.messages import CARRIER
from tests.spool.queueing import ResumedDeliveries, client_record, eventually, some_bytes
from tests.spool.scripted_relay import BUSY, GONE, ScriptedRelay
from tests.support.deliveries import MAIL
from tests.support.relaying import BOB, BODY, CAROL, HEADER

LARGE = some_bytes(60_000)


class NoAttempts:
    """A runner that has no room for anything."""

    def reserve(self, destinations: Sequence[str]) -> bool:
        return False

    def begin(self, destinations: Sequence[str], leases: Sequence[Lease], content: Sequence[bytes] | None) -> None:
        raise AssertionError("nothing was reserved")

    def wake(self, destinations: Sequence[str]) -> None:
        pass


@dataclass
class Client:
    """What a session would hear of one mail."""

    transaction: MailTransaction
    record: TransactionRecord
    recipients: list[Reply] = field(default_factory=list)
    answers: list[tuple[Reply, Sequence[Reply]]] = field(default_factory=list)
    resumed: int = 0

    async def ask(self, *recipients: Recipient) -> list[int]:
        before = len(self.recipients)
        self.transaction.recipients(recipients, self.recipients.extend)
        await eventually(lambda: len(self.recipients) == before + len(recipients))
        return [reply.code for reply in self.recipients[before:]]

    def begin_content(self) -> None:
        def resume() -> None:
            self.resumed += 1

        self.transaction.content(resume)

    def write(self, *chunks: bytes) -> list[bool]:
        return [self.transaction.write(chunk) for chunk in chunks]

    def finish(self) -> None:
        self.transaction.finish(lambda final, own: self.answers.append((final, own)))

    async def answer(self) -> Reply:
        await eventually(lambda: self.answers)
        ((reply, _),) = self.answers
        return reply

    async def send(self, *recipients: Recipient) -> Reply:
        await self.ask(*recipients)
        self.begin_content()
        self.write(HEADER, BODY)
        self.finish()
        return await self.answer()


@dataclass
class Gateway:
    """Both forwarders over one store and one relay."""

    store: EmbeddedStore
    relay: ScriptedRelay
    intake: Intake

    def queued(self) -> Client:
        return self._client(SpoolForwarder(self.intake).begin)

    def direct(self) -> Client:
        return self._client(DirectThenQueueForwarder(self.relay, self.intake).begin)

    def _client(self, begin: Callable[..., MailTransaction]) -> Client:
        record = client_record(MAIL)
        return Client(begin(MAIL, record), record)

    async def spooled(self) -> list[tuple[str, list[str]]]:
        page = await self.store.page("", 10)
        return [(shown.id, [address for address, _, _ in shown.recipients]) for shown in page]


@pytest.fixture
def gateway(store: EmbeddedStore) -> Gateway:
    relay = ScriptedRelay()
    intake = Intake(
        store, relay, NoAttempts(), ResumedDeliveries(), max_age_seconds=3600.0, first_wait_seconds=lambda: 60.0
    )
    return Gateway(store, relay, intake)


async def test_room_that_was_kept_for_a_message_is_given_back_where_our_own_code_fails(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Sequence[Lease]] = []

    class Roomy(NoAttempts):
        def reserve(self, destinations: Sequence[str]) -> bool:
            return True

        def begin(self, destinations: Sequence[str], leases: Sequence[Lease], content: object) -> None:
            begun.append(leases)

    def submit(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(gateway.intake, "_attempts", Roomy())
    monkeypatch.setattr(gateway.store, "submit", submit)
    client = gateway.queued()
    await client.ask(BOB)
    client.begin_content()
    client.write(HEADER, BODY)
    with pytest.raises(ZeroDivisionError):
        client.finish()
    assert begun == [()]


def failed(error: Exception) -> asyncio.Future[Sequence[Lease]]:
    """What a store that fails answers."""
    answer: asyncio.Future[Sequence[Lease]] = asyncio.get_running_loop().create_future()
    answer.set_exception(error)
    return answer


def files(store: EmbeddedStore) -> list[Path]:
    """Contents that are on their way; the store keeps an empty file at hand for the next."""
    return [file for file in (store.directory.path / "tmp").iterdir() if file.stat().st_size]


class Attempts(NoAttempts):
    """A runner with room for everything: what clients had heard when an attempt began, for each."""

    def __init__(self, clients: Callable[[], list[bool]]) -> None:
        self._clients = clients
        self.begun: list[list[bool]] = []

    def reserve(self, destinations: Sequence[str]) -> bool:
        return True

    def begin(self, destinations: Sequence[str], leases: Sequence[Lease], content: Sequence[bytes] | None) -> None:
        assert len(leases) == 1
        self.begun.append(self._clients())


async def test_all_clients_of_a_group_are_answered_before_any_of_its_mails_is_attempted(store: EmbeddedStore) -> None:
    clients: list[Client] = []
    attempts = Attempts(lambda: [bool(client.answers) for client in clients])
    intake = Intake(
        store, ScriptedRelay(), attempts, ResumedDeliveries(), max_age_seconds=3600.0, first_wait_seconds=lambda: 60.0
    )
    gateway = Gateway(store, ScriptedRelay(), intake)
    clients += [gateway.queued() for _ in range(3)]
    for client in clients:
        await client.ask(BOB)
        client.begin_content()
        client.write(HEADER, BODY)
    for client in clients:
        client.finish()
    await eventually(lambda: len(attempts.begun) == 3)
    assert attempts.begun == [[True] * 3] * 3


async def test_a_queue_reports_itself_where_the_upstream_does_not(gateway: Gateway) -> None:
    """RFC 3461 5.2.2: whoever hands mail on to a server without DSN tells of it, and obeys NOTIFY."""
    queue = SpoolForwarder(gateway.intake)
    for known in (Extensions(), Extensions(smtputf8=True, size=1000), Extensions(dsn=True)):
        gateway.relay.can = known
        assert queue.capabilities() == replace(known, dsn=True)
        assert queue.capabilities() is queue.capabilities()
    gateway.relay.can = Extensions()
    assert not DirectThenQueueForwarder(gateway.relay, gateway.intake).capabilities().dsn


async def test_a_fault_on_the_client_s_side_takes_no_attempt_from_its_mail(
    store: EmbeddedStore, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = Attempts(list)
    intake = Intake(
        store, ScriptedRelay(), attempts, ResumedDeliveries(), max_age_seconds=3600.0, first_wait_seconds=lambda: 60.0
    )
    client = Gateway(store, ScriptedRelay(), intake).queued()
    await client.ask(BOB)
    client.begin_content()
    client.write(HEADER, BODY)
    client.transaction.finish(lambda *_: 1 / 0)  # type: ignore[arg-type]
    await eventually(lambda: attempts.begun)
    assert "internal error" in caplog.text


async def test_a_mail_waits_for_those_whose_transaction_is_open_and_not_for_those_given_up(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otel_smtp.spool.embedded.log.COMPANY_SECONDS", 3600.0)
    begun, _, other = (gateway.queued() for _ in range(3))
    await other.ask(BOB)
    other.begin_content()
    other.write(HEADER, BODY)
    other.finish()
    await asyncio.sleep(0.02)
    assert not other.answers
    begun.transaction.abort()
    assert await other.answer() == replies.OK


async def test_a_message_is_answered_with_its_id_once_it_is_durable(gateway: Gateway) -> None:
    client = gateway.queued()
    assert (await client.send(BOB)).code == 250
    ((spool_id, addresses),) = await gateway.spooled()
    assert addresses == [BOB.address]
    assert client.record.spool_id == client.transaction.spool_id == spool_id
    shown = await gateway.store.show(spool_id)
    assert shown.carrier == CARRIER


@pytest.mark.parametrize("body", [BODY, b"", LARGE * 2], ids=["small", "none", "large"])
async def test_a_message_that_is_whole_is_stored_as_one_that_comes_in_pieces(gateway: Gateway, body: bytes) -> None:
    client = gateway.queued()
    await client.ask(BOB)
    client.transaction.message(HEADER, body, lambda final, own: client.answers.append((final, own)))
    assert (await client.answer()).code == 250
    ((spool_id, _),) = await gateway.spooled()
    shown = await gateway.store.show(spool_id)
    assert await gateway.store.read(shown.content, 0, shown.content.octets) == HEADER + body
    assert shown.header_octets == len(HEADER)


@pytest.mark.parametrize(
    ("header", "body", "answer"),
    [
        (HEADER, BODY, replies.OK),
        (HEADER, LARGE[:-1].hex().encode(), replies.OK),
        (HEADER, b"\r\n\xe4\r\n", replies.NEEDS_8BITMIME),
        (HEADER.replace(b"Subject: ", b"Subject: \xe4"), BODY, replies.NEEDS_8BITMIME),
        (HEADER, LARGE * 2, replies.NEEDS_8BITMIME),
    ],
)
async def test_a_whole_message_is_refused_for_8_bit_content_that_was_not_offered(
    gateway: Gateway, header: bytes, body: bytes, answer: Reply
) -> None:
    gateway.relay.can = Extensions(size=1)  # it is known, and does not take it
    mail, record = MAIL._replace(body=Body.EIGHT_BIT_MIME), client_record(MAIL)
    record.is_8bit_offered = False
    client = Client(SpoolForwarder(gateway.intake).begin(mail, record), record)
    await client.ask(BOB)
    client.transaction.message(header, body, lambda final, own: client.answers.append((final, own)))
    assert await client.answer() == answer


async def test_a_large_content_holds_its_client_back_until_the_disk_has_it(gateway: Gateway) -> None:
    client = gateway.queued()
    await client.ask(BOB)
    client.begin_content()
    assert client.write(HEADER, LARGE) == [True, True]
    assert client.write(LARGE) == [False]
    await eventually(lambda: client.resumed == 1)
    # A client that does not stop at once is heard all the same, and goes on once.
    assert client.write(*[LARGE] * 6) == [True] * 4 + [False] * 2
    await eventually(lambda: client.resumed == 2)
    client.finish()
    assert (await client.answer()).code == 250
    ((spool_id, _),) = await gateway.spooled()
    content = (await gateway.store.show(spool_id)).content
    assert await gateway.store.read(content, 0, content.octets) == HEADER + LARGE * 8
    assert files(gateway.store) == []


@pytest.mark.parametrize("mode", ["queued", "direct"])
@pytest.mark.parametrize("after", ["begin", "recipients", "content", "write", "spill"])
async def test_an_abort_at_any_point_leaves_nothing(gateway: Gateway, mode: str, after: str) -> None:
    client: Client = getattr(gateway, mode)()
    if after != "begin":
        await client.ask(BOB)
    if after in ("content", "write", "spill"):
        client.begin_content()
    if after in ("write", "spill"):
        client.write(HEADER, *[LARGE] * (3 if after == "spill" else 1))
    client.transaction.abort()
    client.transaction.abort()
    await eventually(lambda: not files(gateway.store))
    assert await gateway.spooled() == []
    assert (client.answers, client.record.spool_id) == ([], None)


async def test_what_was_handed_to_the_disk_is_whole_though_nobody_waits_for_it(gateway: Gateway) -> None:
    client = gateway.queued()
    await client.ask(BOB)
    client.begin_content()
    client.write(HEADER, BODY)
    client.finish()
    client.transaction.abort()

    async def is_spooled() -> bool:
        return bool(await gateway.spooled())

    await eventually(is_spooled)
    assert client.answers == []


async def test_a_disk_that_fails_while_content_comes_is_told_at_the_end(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("otel_smtp.spool.embedded.draft.write_all", full)
    client = gateway.queued()
    await client.ask(BOB)
    client.begin_content()
    assert client.write(HEADER, LARGE, LARGE) == [True, True, False]
    await eventually(lambda: client.resumed == 1)
    assert client.write(*[LARGE] * 10) == [True] * 10
    client.finish()
    assert await client.answer() is replies.STORAGE_FULL
    await eventually(lambda: not files(gateway.store))
    assert client.record.spool_id is None


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (StorageFull("full"), replies.STORAGE_FULL),
        (StorageBusy("slow"), replies.STORAGE_BUSY),
        (StorageAway("gone"), replies.STORAGE_FAILED),
        (SpoolError("broken"), replies.STORAGE_FAILED),
    ],
)
async def test_a_client_is_told_what_the_spool_lacks(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, error: SpoolError, reply: Reply
) -> None:
    monkeypatch.setattr(gateway.store, "refusal", lambda: error)
    with pytest.raises(Transient) as refused:
        gateway.queued()
    assert refused.value.reply is reply


async def test_a_bug_of_ours_is_an_answer_too(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.store, "submit", lambda *_, **__: failed(ZeroDivisionError()))
    assert await gateway.queued().send(BOB) is replies.STORAGE_FAILED


# The upstream first --------------------------------------------------------------------------------------------


async def test_the_slower_of_upstream_and_disk_sets_the_pace(gateway: Gateway) -> None:
    gateway.relay.room = 2
    client = gateway.direct()
    await client.ask(BOB)
    client.begin_content()
    assert client.write(HEADER, BODY, BODY) == [True, True, False]
    (upstream,) = gateway.relay.transactions
    upstream.make_room()
    assert client.resumed == 1
    assert client.write(LARGE, LARGE) == [True, False]  # the disk's
    await eventually(lambda: client.resumed == 2)
    assert client.write(LARGE) == [False]  # the upstream's
    assert client.resumed == 2
    upstream.make_room()
    assert client.resumed == 3
    client.finish()
    assert (await client.answer()).code == 250
    assert await gateway.spooled() == []
    await eventually(lambda: not files(gateway.store))


async def test_both_full_is_one_wait(gateway: Gateway) -> None:
    gateway.relay.room = 1
    client = gateway.direct()
    await client.ask(BOB)
    client.begin_content()
    assert client.write(HEADER, LARGE + LARGE) == [True, False]
    gateway.relay.transactions[0].make_room()
    await eventually(lambda: client.resumed == 1)
    assert client.write(BODY) == [True]
    assert client.resumed == 1


@pytest.mark.parametrize(
    ("final", "own", "told", "spooled"),
    [
        (replies.OK, (), 250, []),
        (BUSY, (), 250, [BOB.address, CAROL.address]),
        (GONE, (), 550, []),
        (replies.OUTCOME_UNKNOWN, (), 250, [BOB.address, CAROL.address]),
        # Recipients with a verdict of their own: who has it does not get it again, the others are the spool's.
        (replies.OK, (replies.OK, BUSY), 250, [CAROL.address]),
        (BUSY, (BUSY, replies.OK), 250, [BOB.address]),
        (GONE, (replies.OK, GONE), 250, [CAROL.address]),
        (BUSY, (replies.OK,), 250, [CAROL.address]),
        (GONE, (GONE, GONE), 550, []),
    ],
)
async def test_what_becomes_of_a_verdict(
    gateway: Gateway, final: Reply, own: Sequence[Reply], told: int, spooled: list[str]
) -> None:
    gateway.relay.finals.append((final, own))
    client = gateway.direct()
    assert (await client.send(BOB, CAROL)).code == told
    found = await gateway.spooled()
    assert [address for _, addresses in found for address in addresses] == spooled
    assert client.record.spool_id == (found[0][0] if found else None)
    if told == 550:
        assert client.answers == [(final, own)]


async def test_an_upstream_that_refuses_mail_for_now_is_passed_by(gateway: Gateway) -> None:
    gateway.relay.mail_refusals.append(BUSY)
    assert (await gateway.direct().send(BOB)).code == 250
    assert len(await gateway.spooled()) == 1
    gateway.relay.mail_refusals.append(BUSY)
    gateway.store.most_messages = 0
    with pytest.raises(Transient):
        gateway.direct()


async def test_a_transaction_without_a_recipient_upstream_is_given_up_there(gateway: Gateway) -> None:
    gateway.relay.verdicts[BOB.address] = BUSY
    assert (await gateway.direct().send(BOB)).code == 250
    assert gateway.relay.transactions[0].calls == ["recipients", "abort"]


async def test_where_the_spool_fails_the_client_hears_the_upstream(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.store, "submit", lambda *_, **__: failed(StorageFull("full")))
    gateway.relay.finals.append((BUSY, ()))
    assert await gateway.direct().send(BOB) is BUSY
    # One of two has it; the client keeps the mail, and nobody loses it.
    gateway.relay.finals.append((replies.OK, (replies.OK, BUSY)))
    assert await gateway.direct().send(BOB, CAROL) is replies.STORAGE_FULL


async def test_an_answer_after_the_abort_is_nobodys(gateway: Gateway) -> None:
    gateway.relay.is_held = True
    gateway.relay.finals.append((BUSY, ()))
    client = gateway.direct()
    await client.ask(BOB)
    client.begin_content()
    client.write(HEADER, BODY)
    client.finish()
    client.transaction.abort()
    gateway.relay.let_go()
    await asyncio.sleep(0)
    assert client.answers == []
    assert await gateway.spooled() == []
    assert gateway.relay.transactions[0].calls == ["recipients", "content", "finish", "abort"]
