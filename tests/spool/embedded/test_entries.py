"""A message as its records have it: the text that it is written as, and what an attempt makes of it."""

import json

from hypothesis import assume, given
from hypothesis import strategies as st

from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.spool.embedded.deliveries import DeliveryEntry
from otel_smtp.spool.embedded.entries import Entry
from otel_smtp.spool.encoding import parameters_of
from otel_smtp.spool.messages import DeliveryState, End, Kind, SpooledRecipient, Verdict, new_id

numbers = st.integers(0, 3)
texts = st.text(max_size=12)  # of others: quotes, controls, and characters beyond ASCII
mails = st.builds(
    Mail,
    reverse_path=texts,
    size=st.none() | numbers,
    body=st.none() | st.sampled_from(Body),
    smtputf8=st.booleans(),
    ret=st.none() | st.sampled_from(DsnReturn),
    envid=st.none() | texts,
    require_tls=st.booleans(),
    auth=st.none() | texts,
)
notifications = st.none() | st.sampled_from([Notify.NEVER, Notify.SUCCESS | Notify.DELAY])
recipients = st.lists(st.builds(Recipient, texts, notifications, st.none() | texts), min_size=1, max_size=3).map(
    lambda found: [SpooledRecipient(number, one, "250 Ok" * number) for number, one in enumerate(found)]
)
deliveries = st.builds(
    DeliveryEntry,
    number=numbers,
    destination=texts,
    state=st.sampled_from(DeliveryState),
    attempts=numbers,
    crashes=numbers,
    due_ms=numbers,
    epoch=numbers,
    is_possible_duplicate=st.booleans(),
    recipients=recipients,
)
entries = st.builds(
    Entry,
    message_id=st.just(new_id()),
    kind=st.sampled_from(Kind),
    mail=mails,
    carrier=st.dictionaries(texts, texts, max_size=2),
    deliveries=st.lists(deliveries, max_size=2),
    arrived_ms=numbers,
    expires_ms=numbers,
    header_octets=numbers,
    octets=numbers,
    is_large=st.booleans(),
    is_warned=st.booleans(),
    is_forced=st.booleans(),
    held_ms=st.none() | numbers,
)


def recipient_values(there: SpooledRecipient) -> tuple[object, ...]:
    """A recipient that has not ended: number, address, NOTIFY, ORCPT, last reply."""
    recipient = there.recipient
    return (
        there.number, recipient.address, None if recipient.notify is None else recipient.notify.value,
        recipient.orcpt, there.last_reply,
    )  # fmt: skip


@given(entries)
def test_the_text_is_what_a_json_encoder_makes(entry: Entry) -> None:
    mail = entry.mail
    values = [
        entry.id, entry.kind, entry.arrived_ms, entry.expires_ms, entry.held_ms, int(entry.is_warned),
        int(entry.is_forced), entry.header_octets, entry.octets, int(entry.is_large), mail.reverse_path,
        parameters_of(mail) or None, entry.carrier,
        [
            [
                one.number, one.destination, one.state, one.attempts, one.crashes, one.due_ms, one.epoch,
                int(one.is_possible_duplicate), [recipient_values(there) for there in one.recipients],
            ]
            for one in entry.deliveries
        ],
    ]  # fmt: skip
    assert entry.encode() == json.dumps(values, separators=(",", ":"))


@given(entries)
def test_what_was_written_is_read(entry: Entry) -> None:
    text = entry.encode()
    assert text.isascii()
    assert Entry.decode(text).encode() == text


@given(entries, st.data())
def test_what_ends_a_message_at_once_is_what_leaves_nothing_of_it(entry: Entry, data: st.DataObject) -> None:
    assume(entry.deliveries)
    for number, one in enumerate(entry.deliveries):
        one.number, one.state = number, DeliveryState.LEASED
    delivery = data.draw(st.sampled_from(entry.deliveries))
    lease = entry.lease_of(delivery)
    numbers = data.draw(st.lists(st.integers(0, 3), unique=True, max_size=4))
    ends = st.none() | st.sampled_from(End)
    verdicts = [Verdict(number, data.draw(ends), replies.OK) for number in numbers]
    before = entry.encode()
    at_once = entry.ended_by(lease, verdicts)
    assert entry.encode() == before
    ended = entry.settle(
        lease, verdicts, now_ms=1, due_ms=2, is_possible_duplicate=False, counts_attempt=True, hold=False
    )
    if at_once is not None:
        assert not entry.deliveries
        assert at_once == ended
    elif not entry.deliveries:
        # It may also be told the long way: verdicts in another order than the recipients.
        assert numbers != sorted(numbers)
