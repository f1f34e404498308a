"""Which upstreams serve which mail."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from otel_smtp.forwarding.routes import Routes
from otel_smtp.smtp.envelope import Mail, Recipient


@dataclass
class Row:
    senders: tuple[str, ...] = ()
    recipients: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("senders", "recipients", "sender", "recipient", "serves"),
    [
        ((), (), "a@x.example", "b@y.example", True),
        (("*@x.example",), (), "a@x.example", "b@y.example", True),
        (("*@x.example",), (), "a@X.EXAMPLE", "b@y.example", True),
        (("*@x.example",), (), "a@sub.x.example", "b@y.example", False),
        (("*@x.example", "*@*.x.example"), (), "a@sub.x.example", "b@y.example", True),
        (("*@x.example",), (), "a@x.example.evil", "b@y.example", False),
        (("*@x.example",), (), "", "b@y.example", False),
        (("",), (), "", "b@y.example", True),  # bounces
        (("*",), (), "", "b@y.example", True),
        ((), ("b@y.example",), "a@x.example", "b@y.example", True),
        ((), ("?@y.example",), "a@x.example", "bb@y.example", False),
        ((), ("?@y.example",), "a@x.example", "b@y.example", True),
        ((), ("b@y.example",), "a@x.example", "b@yxexample", False),  # a dot is a dot
        ((), ("*.b@*.y.*",), "a@x.example", "a.b@c.y.d", True),
        ((), ("*.b@*.y.*",), "a@x.example", "a.b@c.b@d.y.e", True),  # the second place for the first part
        ((), ("*ab*b",), "a@x.example", "ab", False),  # an octet serves once
        ((), ("*ab*b",), "a@x.example", "aab.b", True),
        ((), ("a*",), "a@x.example", '"b\na"', False),
        ((), ("*\\?a",), "a@x.example", '"\\ba', True),
        ((), ("**",), "a@x.example", "anything", True),
        ((), ("a@x.example", "*1@y.example", "*b*@*"), "a@x.example", "abc@y.example", True),
        ((), ("postmaster",), "a@x.example", "Postmaster", True),
        (("*@x.example",), ("*@y.example",), "a@x.example", "b@z.example", False),
    ],
)
def test_patterns(senders: Sequence[str], recipients: Sequence[str], sender: str, recipient: str, serves: bool) -> None:
    routes = Routes([(Row(tuple(senders), tuple(recipients)), "up")])
    found = routes.for_mail(Mail(sender)).for_recipient(Recipient(recipient))
    assert list(found) == (["up"] if serves else [])


def test_the_order_of_preference_is_kept() -> None:
    routes = Routes([(Row(recipients=("*@y.example",)), "first"), (Row(), "second"), (Row(senders=("x",)), "third")])
    serving = routes.for_mail(Mail("a@x.example"))
    assert list(serving.for_recipient(Recipient("b@y.example"))) == ["first", "second"]
    assert list(serving.for_recipient(Recipient("b@z.example"))) == ["second"]
    everybody = Routes([(Row(), "first"), (Row(), "second")]).for_mail(Mail("a@x.example"))
    assert list(everybody.for_recipient(Recipient("b@y.example"))) == ["first", "second"]
