"""The pytest plugin: `smtp_gateway` and `mailbox`.

pytest imports this module in every run wherever the package is installed, so it imports nothing of the gateway until a
test asks for a fixture.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from otel_smtp.testing.mailbox import Mailbox
    from otel_smtp.testing.running_gateway import RunningGateway


@pytest.fixture
def smtp_gateway_settings() -> Mapping[str, object]:
    """The gateway's settings, as its TOML file has them; override it to change some.

    ::

        @pytest.fixture
        def smtp_gateway_settings():
            return {"limits": {"message_size": "1MiB"}}
    """
    return {}


@pytest.fixture
def smtp_gateway(smtp_gateway_settings: Mapping[str, object]) -> "Iterator[RunningGateway]":
    """A gateway for this test, at `smtp_gateway.host` and `smtp_gateway.port`."""
    from otel_smtp.testing.running_gateway import run_gateway

    with run_gateway(smtp_gateway_settings) as gateway:
        yield gateway


@pytest.fixture
def mailbox(smtp_gateway: "RunningGateway") -> "Mailbox":
    """The mailbox behind the gateway: messages by recipient, and faults on demand."""
    return smtp_gateway.mailbox
