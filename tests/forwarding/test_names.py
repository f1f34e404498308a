"""An upstream's name is looked up for each connection, so that where it leads may change."""

import dataclasses
import socket
from typing import Any

import pytest

from otel_smtp.forwarding.settings import PoolLimits
from tests.support.relaying import relay, relaying, settings
from tests.support.upstream import ScriptedUpstream

NAME = "smarthost.test"


async def test_a_name_that_leads_elsewhere_is_followed_by_the_next_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ["127.0.0.2"]
    system = socket.getaddrinfo

    def resolver(host: Any, *arguments: Any, **more: Any) -> Any:
        if host != NAME:
            return system(host, *arguments, **more)
        return [found for address in addresses for found in system(address, *arguments, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    first = ScriptedUpstream()
    await first.start("127.0.0.2")
    second = ScriptedUpstream()
    await second.start("127.0.0.3", first.port)
    named = dataclasses.replace(settings(first), host=NAME, limits=PoolLimits(messages=1))
    async with first, second, relaying(named) as forwarder:
        assert (await relay(forwarder)).told.is_positive
        addresses[:] = ["127.0.0.3"]
        assert (await relay(forwarder)).told.is_positive
        assert (len(first.kept), len(second.kept)) == (1, 1)
        # Two addresses, the first of which is dead: the second one is tried within the same attempt.
        await first.stop()
        addresses[:] = ["127.0.0.2", "127.0.0.3"]
        relayed = await relay(forwarder)
        assert relayed.told.is_positive
        assert len(relayed.seen.deliveries) == 1
        assert len(second.kept) == 2
