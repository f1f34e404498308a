"""The mailbox by itself: who is meant, what a fault may say, what is kept."""

import threading
from email.message import EmailMessage

import pytest

from otel_smtp.testing import Mailbox, ReceivedMail

BOB = "Bob@There.example"


def mail(*recipients: str, content: bytes = b"Subject: x\r\n\r\nHello\r\n") -> ReceivedMail:
    return ReceivedMail("a@shop.example", recipients, content)


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("bob@there.example", True),
        ("BOB@THERE.EXAMPLE", True),
        ("bob@", True),
        ("@there.example", True),
        ("@", True),
        ("ob@", False),
        ("bob@there", False),
        ("@here.example", False),
        ("@example", False),
        ("ann@", False),
    ],
)
def test_a_recipient_is_named_by_the_whole_address_or_half_of_it(pattern: str, fits: bool) -> None:
    mailbox = Mailbox()
    mailbox.take(mail(BOB))
    assert len(mailbox[pattern]) == fits
    mailbox.refuse(pattern)
    assert (mailbox.judge_recipient(BOB) is not None) == fits


@pytest.mark.parametrize("pattern", ["bob", "", "there.example"])
def test_a_name_without_an_at_is_nobodys(pattern: str) -> None:
    mailbox = Mailbox()
    with pytest.raises(ValueError, match="allowed"):
        mailbox.refuse(pattern)
    with pytest.raises(ValueError, match="allowed"):
        mailbox[pattern]


def test_messages_are_email_messages_in_order_of_arrival() -> None:
    mailbox = Mailbox()
    for number in range(3):
        content = f"Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?= {number}\r\n\r\nHello\r\n".encode()
        mailbox.take(mail(f"{number}@there.example", "all@there.example", content=content))
    assert all(isinstance(message, EmailMessage) for message in mailbox.messages)
    assert [message["Subject"] for message in mailbox["all@"]] == ["grüße 0", "grüße 1", "grüße 2"]
    (second,) = mailbox["1@"]
    assert second["Subject"] == "grüße 1"
    assert mailbox["9@"] == []
    assert [one.recipients[0] for one in mailbox.mails] == ["0@there.example", "1@there.example", "2@there.example"]
    mailbox.clear()
    assert mailbox.messages == []


def test_waiting_ends_when_the_message_arrives() -> None:
    mailbox = Mailbox()
    timer = threading.Timer(0.05, mailbox.take, [mail(BOB)])
    timer.start()
    (message,) = mailbox.wait_for(1, "bob@")
    assert message["Subject"] == "x"
    timer.join()


def test_waiting_in_vain_says_what_there_is() -> None:
    mailbox = Mailbox()
    mailbox.take(mail(BOB))
    with pytest.raises(TimeoutError, match=r"1 of 2 messages for '@there\.example' in 0\.01 s"):
        mailbox.wait_for(2, "@there.example", timeout_seconds=0.01)


def test_the_newest_fault_decides_and_one_that_is_used_up_is_gone() -> None:
    mailbox = Mailbox()
    mailbox.refuse("@there.example", 553, "5.1.3 first")
    mailbox.defer("bob@", text="4.2.0 second", times=2)
    judged = [mailbox.judge_recipient(BOB) for _ in range(3)]
    assert judged == ["451 4.2.0 second", "451 4.2.0 second", "553 5.1.3 first"]
    assert mailbox.judge_recipient("ann@there.example") == "553 5.1.3 first"
    mailbox.recover()
    assert mailbox.judge_recipient(BOB) is None


def test_content_faults_keep_the_message_only_where_they_say_so() -> None:
    mailbox = Mailbox()
    mailbox.refuse_content("bob@", times=1)
    assert mailbox.take(mail(BOB)) == ("554 5.7.1 message refused", 0.0)
    mailbox.drop_after_dot(times=1)
    assert mailbox.take(mail(BOB)) == (None, 0.0)
    assert mailbox.messages == []
    mailbox.drop_after_dot(keep=True, times=1)
    assert mailbox.take(mail(BOB)) == (None, 0.0)
    assert len(mailbox.messages) == 1
    mailbox.slow(2.5, times=1)
    assert mailbox.take(mail(BOB)).seconds == 2.5
    assert mailbox.take(mail(BOB)) == ("250 2.0.0 Ok: in the mailbox", 0.0)
    assert len(mailbox.messages) == 3


@pytest.mark.parametrize("method", ["refuse", "defer", "refuse_content"])
@pytest.mark.parametrize("text", ["two\r\nlines", "ümlaut", "tab\there"])
def test_a_reply_is_one_line_of_ascii(method: str, text: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        getattr(Mailbox(), method)("bob@", text=text)


@pytest.mark.parametrize(
    ("method", "code"),
    [("refuse", 451), ("refuse", 600), ("refuse", 250), ("defer", 550), ("defer", 399), ("refuse_content", 250)],
)
def test_a_code_is_of_the_class_that_the_method_is_for(method: str, code: int) -> None:
    with pytest.raises(ValueError, match="code"):
        getattr(Mailbox(), method)("bob@", code)


@pytest.mark.parametrize(("method", "code"), [("refuse", 599), ("defer", 400), ("refuse_content", 452)])
def test_and_any_of_that_class_will_do(method: str, code: int) -> None:
    getattr(Mailbox(), method)("bob@", code)


def test_nonsense_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="times"):
        Mailbox().refuse(times=0)
    with pytest.raises(ValueError, match="seconds"):
        Mailbox().slow(-1)
