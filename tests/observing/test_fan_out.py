"""Observers side by side: every hook arrives, one that raises is dropped, and no other notices."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pytest

from otel_smtp.observing import (
    HOOKS,
    ConnectionInfo,
    ConnectionRecord,
    DeliveryRecord,
    Endpoint,
    Observer,
    Outcome,
    StateCallback,
    TransactionRecord,
    fan_out,
)
from otel_smtp.observing.fan_out import MOST_FAULTS, MOST_WAITING
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.states import ConnState, Transition

CONNECTION: Final = ConnectionRecord(
    ConnectionInfo("0" * 32, Endpoint("127.0.0.1", 40000), Endpoint("127.0.0.1", 2525), "local"), 1, 2
)
TRANSACTION: Final = TransactionRecord(Mail("a@example.com"), 1, CONNECTION, 3, 2)
DELIVERY: Final = DeliveryRecord(TRANSACTION, "provider", Endpoint("upstream.example", 25), 1, 4)
NEW: Final = Transition(ConnState.NEW, None, ConnState.NEW, 1)
ACTIVE: Final = Transition(ConnState.ACTIVE, ConnState.NEW, ConnState.ACTIVE, 2)
CLOSED: Final = Transition(ConnState.CLOSED, ConnState.NEW, ConnState.CLOSED, 2)
# Each hook with arguments of its kind: a hook that is added to the interface has to be added here.
CALLS: Final[Mapping[str, tuple[Any, ...]]] = {
    "connection_opened": (CONNECTION,),
    "connection_refused": ("capacity",),
    "conn_state": (CONNECTION, NEW),
    "segment_ended": (CONNECTION,),
    "connection_closed": (CONNECTION,),
    "transaction_ended": (TRANSACTION,),
    "transactions_settled": ([TRANSACTION],),
    "delivery_ended": (DELIVERY,),
    "deliveries_settled": ([DELIVERY],),
    "spool_acted": (TRANSACTION,),
    "trace_id": (TRANSACTION,),
    "carrier": (TRANSACTION,),
    "delivery_carrier": (DELIVERY,),
    "connection_carrier": (CONNECTION,),
}


class Recording(Observer):
    """Notes what it is told. Its hooks are made from the interface, so that none is forgotten."""

    def __init__(self, *, raises_at: str = "", error: type[BaseException] = ValueError, answer: object = None) -> None:
        self.raises_at = raises_at
        self.error = error
        self.answer = answer
        self.told: list[tuple[str, tuple[Any, ...]]] = []

    def note(self, hook: str, arguments: tuple[Any, ...]) -> object:
        self.told.append((hook, arguments))
        if hook == self.raises_at:
            raise self.error(hook)
        return self.answer


def _recorder(hook: str) -> Any:
    return lambda self, *arguments: self.note(hook, arguments)


for _hook in HOOKS:
    setattr(Recording, _hook, _recorder(_hook))


# Those by which a fan-out tells what it is told by one of them.
BOTH: Final[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
    "transaction_ended": ("transactions_settled", ([TRANSACTION],)),
    "delivery_ended": ("deliveries_settled", ([DELIVERY],)),
}
TOLD: Final = [*CALLS]  # when it is told all that
for one, (other, _) in BOTH.items():
    TOLD.insert(TOLD.index(one) + 1, other)


def call_all(observer: Observer) -> None:
    for hook, arguments in CALLS.items():
        getattr(observer, hook)(*arguments)


def test_every_hook_of_the_interface_is_tried_here() -> None:
    assert set(CALLS) == set(HOOKS)


@pytest.mark.parametrize("hook", CALLS)
def test_every_hook_arrives_at_every_member_with_its_arguments(hook: str) -> None:
    members = [Recording(), Recording(), Recording()]
    getattr(fan_out(members), hook)(*CALLS[hook])
    told = [(hook, CALLS[hook])]
    if hook in BOTH:
        told.append(BOTH[hook])
    assert [member.told for member in members] == [told] * 3


@pytest.mark.parametrize("hook", CALLS)
def test_a_member_that_raises_is_dropped_for_good_and_logged_once(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Recording(raises_at=hook), Recording()
    fan = fan_out([bad, good])
    with caplog.at_level(logging.ERROR, "otel_smtp"):
        call_all(fan)
        call_all(fan)
    assert [told for told, _ in good.told] == [*TOLD, *TOLD]
    assert [told for told, _ in bad.told] == TOLD[: TOLD.index(hook) + 1]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [asyncio.CancelledError, MemoryError, RecursionError])
@pytest.mark.parametrize("hook", CALLS)
def test_whatever_a_member_raises_stays_with_it(
    hook: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Recording(raises_at=hook, error=error), Recording()
    with caplog.at_level(logging.ERROR, "otel_smtp"):
        call_all(fan_out([bad, good]))
    assert [told for told, _ in good.told] == TOLD
    assert len(caplog.records) == 1


def test_what_ends_the_process_ends_it() -> None:
    with pytest.raises(SystemExit):
        fan_out([Recording(raises_at="connection_opened", error=SystemExit)]).connection_opened(CONNECTION)


ASKS: Final = [hook for hook, asks in HOOKS.items() if asks]
TRACE_IDS: Final = ("0af7651916cd43dd8448eb211c80319c", "4bf92f3577b34da6a3ce929d0e0e4736")


def answers(hook: str) -> Sequence[object]:
    """Two to a hook that asks."""
    return [one if hook == "trace_id" else {"traceparent": f"00-{one}-00f067aa0ba902b7-01"} for one in TRACE_IDS]


@pytest.mark.parametrize("hook", ASKS)
def test_the_first_answer_that_is_not_empty_holds(hook: str) -> None:
    first, second = answers(hook)
    members = [Recording(), Recording(answer={}), Recording(answer=first), Recording(answer=second)]
    assert getattr(fan_out(members), hook)(*CALLS[hook]) == first
    assert len(members[3].told) == 0


class AsOurs(Recording):
    """Defined, as far as can be seen, in the package."""


AsOurs.__module__ = "otel_smtp.telemetry.tracing"


@pytest.mark.parametrize("kind", [Recording, AsOurs])
@pytest.mark.parametrize("answer", [17, object(), b"00", ["traceparent"], Mapping])
@pytest.mark.parametrize("hook", ASKS)
def test_an_answer_of_another_type_is_no_answer(
    hook: str, answer: object, kind: type[Recording], caplog: pytest.LogCaptureFixture
) -> None:
    good, _ = answers(hook)
    alone, beside = fan_out([kind(answer=answer)]), fan_out([kind(answer=answer), Recording(answer=good)])
    for _ in range(2):
        assert getattr(alone, hook)(*CALLS[hook]) == getattr(Observer(), hook)(*CALLS[hook])
        assert getattr(beside, hook)(*CALLS[hook]) == good
    assert [record.__dict__["hook"] for record in caplog.records] == [hook, hook]


@pytest.mark.parametrize("answer", ["", None, "abc", TRACE_IDS[0].upper(), f"{TRACE_IDS[0]}\r\n250 Ok"])
def test_a_trace_id_is_32_hexadecimal_digits(answer: str | None) -> None:
    assert fan_out([Recording(answer=answer)]).trace_id(TRANSACTION) is None


@pytest.mark.parametrize("answer", [{"traceparent": 1}, {1: "a"}, {"traceparent": None}, "traceparent", TRACE_IDS[0]])
@pytest.mark.parametrize("hook", [hook for hook in ASKS if hook != "trace_id"])
def test_headers_are_texts(hook: str, answer: object) -> None:
    assert getattr(fan_out([Recording(answer=answer)]), hook)(*CALLS[hook]) == {}


@pytest.mark.parametrize("hook", ASKS)
def test_where_nobody_answers_the_answer_is_the_interfaces_own(hook: str) -> None:
    assert getattr(fan_out([Recording()]), hook)(*CALLS[hook]) == getattr(Observer(), hook)(*CALLS[hook])


def test_the_questions_are_those_about_traces() -> None:
    assert {hook for hook, asks in HOOKS.items() if asks} == {
        "trace_id",
        "carrier",
        "delivery_carrier",
        "connection_carrier",
    }


def test_a_hook_that_nobody_overrides_calls_nobody() -> None:
    class Quiet(Observer):
        def connection_refused(self, reason: str) -> None:
            raise AssertionError("not called")

    fan = fan_out([Quiet()])
    fan.transaction_ended(TRANSACTION)
    assert not fan.wants_transitions
    assert fan_out([Quiet(), Recording()]).wants_transitions


class Settled(Observer):
    """Notes the transactions that it is told together, and what else it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def transactions_settled(self, transactions: Sequence[TransactionRecord]) -> None:
        self.told.append([transaction.number for transaction in transactions])

    def segment_ended(self, connection: ConnectionRecord) -> None:
        self.told.append("segment")

    def connection_closed(self, connection: ConnectionRecord) -> None:
        self.told.append("closed")

    def deliveries_settled(self, deliveries: Sequence[DeliveryRecord]) -> None:
        self.told.append([f"delivery {delivery.transaction.number}" for delivery in deliveries])


def attempt(
    fan: Observer, number: int, outcome: Outcome = Outcome.RELAYED, connection: ConnectionRecord | None = None
) -> None:
    """Report an attempt at a message of the spool, whose record nothing else keeps."""
    record = TransactionRecord(Mail("a@example.com"), number, connection, 3, 2)
    record.deliveries.append(DeliveryRecord(record, "provider", Endpoint("upstream.example", 25), 1, 4))
    record.deliveries[0].end(outcome, replies.OK, None, 5)
    fan.delivery_ended(record.deliveries[0])


def ended(number: int, outcome: Outcome = Outcome.RELAYED, delivery_ended_ns: int | None = 5) -> TransactionRecord:
    record = TransactionRecord(Mail("a@example.com"), number, CONNECTION, 3, 2)
    if delivery_ended_ns is not None:
        record.deliveries.append(DeliveryRecord(record, "provider", Endpoint("upstream.example", 25), 1, 4))
        record.deliveries[0].ended_ns = delivery_ended_ns
    record.end(outcome, replies.OK, 6)
    return record


def test_transactions_that_went_well_are_told_together_when_their_time_has_come() -> None:
    settled, due = Settled(), list[Callable[[], None]]()
    fan = fan_out([settled], due.append)
    for record in (ended(1), ended(2, Outcome.QUEUED, None), ended(3)):
        fan.transaction_ended(record)
    assert (settled.told, len(due)) == ([], 1)
    due[0]()
    due[0]()
    assert settled.told == [[1, 2, 3]]
    fan.transaction_ended(ended(4))
    due[0]()
    assert settled.told == [[1, 2, 3]], "these are others, whose time has not come"
    due[1]()
    assert settled.told == [[1, 2, 3], [4]]


def test_what_waits_is_told_before_its_segment_ends_and_when_somebody_asks() -> None:
    settled = Settled()
    fan = fan_out([settled], lambda work: None)
    fan.transaction_ended(ended(1))
    fan.segment_ended(CONNECTION)
    fan.transaction_ended(ended(2))
    fan.connection_closed(CONNECTION)
    fan.transaction_ended(ended(3))
    fan.catch_up()
    fan.catch_up()
    assert settled.told == [[1], "segment", [2], "closed", [3]]


@pytest.mark.parametrize(
    "record",
    [ended(2, outcome) for outcome in Outcome if outcome not in (Outcome.RELAYED, Outcome.QUEUED)]
    + [ended(2, Outcome.QUEUED, 0)],  # its attempt is under way, and will be told by itself
)
def test_what_went_wrong_or_is_not_over_is_told_at_once_after_what_waits(record: TransactionRecord) -> None:
    settled = Settled()
    fan = fan_out([settled], lambda work: None)
    fan.transaction_ended(ended(1))
    assert settled.told == []
    fan.transaction_ended(record)
    assert settled.told == [[1, 2]]


def test_no_more_wait_than_a_turn_of_the_loop_has_time_for() -> None:
    settled = Settled()
    fan = fan_out([settled], lambda work: None)
    for number in range(MOST_WAITING + 1):
        fan.transaction_ended(ended(number))
    assert settled.told == [[*range(MOST_WAITING)]]


def test_attempts_from_the_spool_that_went_well_are_told_together_after_the_transactions() -> None:
    settled, due = Settled(), list[Callable[[], None]]()
    fan = fan_out([settled], due.append)
    attempt(fan, 1)
    fan.transaction_ended(ended(2))
    attempt(fan, 3)
    assert (settled.told, len(due)) == ([], 1)
    due[0]()
    due[0]()
    assert settled.told == [[2], ["delivery 1", "delivery 3"]]


@pytest.mark.parametrize(
    ("outcome", "connection"),
    [*((outcome, None) for outcome in Outcome if outcome is not Outcome.RELAYED), (Outcome.RELAYED, CONNECTION)],
)
def test_an_attempt_that_went_wrong_or_whose_client_is_gone_is_told_at_once(
    outcome: Outcome, connection: ConnectionRecord | None
) -> None:
    settled = Settled()
    fan = fan_out([settled], lambda work: None)
    attempt(fan, 1)
    assert settled.told == []
    attempt(fan, 2, outcome, connection)
    assert settled.told == [["delivery 1", "delivery 2"]]


def test_attempts_and_transactions_have_one_bound() -> None:
    settled = Settled()
    fan = fan_out([settled], lambda work: None)
    fan.transaction_ended(ended(0))
    for number in range(MOST_WAITING):
        attempt(fan, number)
    assert settled.told == [[0], [f"delivery {number}" for number in range(MOST_WAITING - 1)]]


def test_who_needs_a_transaction_at_once_is_told_it_at_once() -> None:
    order: list[str] = []

    class AtOnce(Observer):
        def transaction_ended(self, transaction: TransactionRecord) -> None:
            order.append("at once")

    class Later(Observer):
        def transactions_settled(self, transactions: Sequence[TransactionRecord]) -> None:
            order.append("later")

    fan = fan_out([Later(), AtOnce()], lambda work: None)
    fan.transaction_ended(ended(1))
    assert order == ["at once"]
    fan.catch_up()
    assert order == ["at once", "later"]
    order.clear()
    fan_out([Later(), AtOnce()]).transaction_ended(ended(1))
    assert order == ["at once", "later"], "where nothing waits too"


@pytest.mark.parametrize(
    "name", ["conn_states", "transaction_end", "connection_close", "trace_ids", "deliveries_ended"]
)
def test_a_misspelt_hook_is_refused_at_construction(name: str) -> None:
    kind = type("Misspelt", (Observer,), {name: lambda self, *arguments: None})
    with pytest.raises(TypeError, match=f"Misspelt.{name} is no hook of Observer: did you mean"):
        fan_out([kind()])


def test_an_observer_may_have_methods_of_its_own() -> None:
    kind = type("Counting", (Observer,), {"page": lambda self: None, "counters": lambda self: None})
    fan_out([kind()])


def test_a_conn_state_callback_gets_the_connection_and_each_transition() -> None:
    told: list[tuple[ConnectionInfo, Transition]] = []
    fan = fan_out([StateCallback(lambda connection, transition: told.append((connection, transition)))])
    fan.conn_state(CONNECTION, NEW)
    fan.conn_state(CONNECTION, ACTIVE)
    assert told == [(CONNECTION.info, NEW), (CONNECTION.info, ACTIVE)]
    assert told[0][0] is told[1][0]


def test_a_conn_state_callback_keeps_no_connection_that_is_closed_and_none_once_it_has_raised() -> None:
    def refuse(_: ConnectionInfo, transition: Transition) -> None:
        if transition is ACTIVE:
            raise ValueError

    callback = StateCallback(refuse)
    others = ConnectionRecord(CONNECTION.info, 1, 2)
    callback.conn_state(others, NEW)
    callback.conn_state(CONNECTION, NEW)
    callback.conn_state(others, CLOSED)
    assert [*callback._infos] == [CONNECTION]
    with pytest.raises(ValueError):
        callback.conn_state(CONNECTION, ACTIVE)
    assert not callback._infos


def test_refused_recipients_are_counted_all_and_kept_to_a_bound() -> None:
    transaction = TransactionRecord(Mail(""), 1, None, 0, 0)
    for number in range(1000):
        transaction.refuse(Recipient(f"r{number}@example.com"), replies.RELAY_DENIED, number)
    assert transaction.refused_count == 1000
    assert len(transaction.refused) == 50
    assert transaction.refused[0].recipient.address == "r0@example.com"


def test_a_thousand_recipients_are_not_a_thousand_phases() -> None:
    delivery = DeliveryRecord(TRANSACTION, "provider", Endpoint("upstream.example", 25), 1, 4)
    for number in range(1000):
        delivery.recipient_phase(number, replies.RECIPIENT_OK)
    assert [at for at, _, _ in delivery.phases] == [999]
    for number in range(1000, 2000):
        delivery.recipient_phase(number, replies.RELAY_DENIED if number % 2 else replies.RECIPIENT_OK)
    assert len(delivery.phases) == 64
    assert delivery.phases[-1][0] == 1999


def test_a_segment_leaves_the_last_of_its_path_behind() -> None:
    connection = ConnectionRecord(CONNECTION.info, 1, 2)
    for start in (0, 20, 40):
        connection.transitions += [NEW._replace(sequence=start + number) for number in range(20)]
        connection.replies.append((None, replies.OK))
        before = connection.transitions
        connection.begin_segment(start)
        assert len(before) == 20, "whoever was given the segment keeps it"
    assert [transition.sequence for transition in connection.earlier] == list(range(36, 60))
    assert (connection.segment, connection.begun_ns, connection.transitions, connection.replies) == (4, 40, [], [])


def test_a_message_from_the_spool_has_a_record_without_a_connection() -> None:
    record = TransactionRecord.resumed("s1", {"traceparent": "x"}, Mail("a@b.example"), is_possible_duplicate=True)
    assert (record.connection, record.number, record.spool_id, record.is_possible_duplicate) == (None, 0, "s1", True)
    assert record.carrier == {"traceparent": "x"}
    record.end(Outcome.RELAYED, replies.OK, 7)
    assert (record.outcome, record.reply, record.error_type, record.ended_ns) == (
        Outcome.RELAYED,
        replies.OK,
        None,
        7,
    )


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (Endpoint("127.0.0.1", 25), "127.0.0.1:25"),
        (Endpoint("::1", 25), "[::1]:25"),
        (Endpoint("/run/smtp.sock"), "/run/smtp.sock"),
    ],
)
def test_an_endpoint_reads_as_people_write_it(endpoint: Endpoint, text: str) -> None:
    assert str(endpoint) == text


class OneOfOurs(Recording):
    __module__ = "otel_smtp.telemetry.of_this_test"


@pytest.mark.parametrize("hook", CALLS)
def test_one_of_our_own_that_raises_goes_on_with_the_next_record(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = OneOfOurs(raises_at=hook), Recording()
    fan = fan_out([bad, good])
    with caplog.at_level(logging.ERROR, "otel_smtp"):
        call_all(fan)
        call_all(fan)
    assert [told for told, _ in bad.told] == [told for told, _ in good.told] == [*TOLD, *TOLD]
    assert [record.getMessage() for record in caplog.records] == [
        "observer raised, telemetry is incomplete; mail is unaffected"
    ]


def test_one_of_our_own_that_raises_without_end_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    bad = OneOfOurs(raises_at="connection_opened")
    fan = fan_out([bad])
    with caplog.at_level(logging.ERROR, "otel_smtp"):
        for _ in range(MOST_FAULTS + 10):
            fan.connection_opened(CONNECTION)
    assert len(bad.told) == MOST_FAULTS
    assert [record.getMessage() for record in caplog.records] == [
        "observer raised, telemetry is incomplete; mail is unaffected",
        "observer raised and is dropped; mail is unaffected",
    ]
