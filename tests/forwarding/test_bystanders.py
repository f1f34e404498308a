"""One upstream that is dead harms nobody whose mail goes to another one."""

import asyncio
import statistics
import time

from otel_smtp.forwarding.settings import Timeouts
from otel_smtp.smtp.envelope import Mail
from tests.support.fault_proxy import FaultProxy
from tests.support.relaying import BOB, CAROL, relay, relaying, settings
from tests.support.upstream import ScriptedUpstream

MAILS = 200
PATIENT = Timeouts(connect=30, greeting=30, command=30, data=30, block=30, reply=30, pool=30)


async def test_latency_beside_a_black_hole() -> None:
    async with ScriptedUpstream() as alive, ScriptedUpstream() as behind, FaultProxy(behind.port) as hole:
        hole.swallow()
        routes = (
            settings(alive, "alive", recipients=(BOB.address,)),
            type(settings(alive))("dead", "127.0.0.1", hole.port, recipients=(CAROL.address,), timeouts=PATIENT),
        )
        async with relaying(*routes) as forwarder:

            async def latencies() -> list[float]:
                found = []
                for _ in range(MAILS):
                    began = time.perf_counter()
                    assert (await relay(forwarder, BOB)).told.is_positive
                    found.append(time.perf_counter() - began)
                return found

            await latencies()
            alone = statistics.quantiles(await latencies(), n=100)[98]
            # More than it has connections: some wait for one, some for its greeting.
            stuck = [
                asyncio.create_task(relay(forwarder, CAROL, mail=Mail(f"a{number}@example.com")))
                for number in range(50)
            ]
            await asyncio.sleep(0)
            beside = statistics.quantiles(await latencies(), n=100)[98]
            assert not any(task.done() for task in stuck)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)
    print(f"p99 alone {alone * 1e3:.2f} ms, beside 50 mails for a black hole {beside * 1e3:.2f} ms")
    # A machine that is shared is noisy; a mail that waited for the dead one would have waited for seconds.
    assert beside < alone * 3 + 1
