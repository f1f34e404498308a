"""Without a receiver, nothing of outcomes is there."""

import subprocess
import sys
from pathlib import Path

from tests.support.process import ROOT

_PROGRAM = """
import asyncio, smtplib, sys
from otel_smtp import Gateway, load

async def main():
    values = {
        "listener": [{"address": ["127.0.0.1:0"]}], "upstream": [{"url": "smtp://127.0.0.1:1"}],
        "delivery": {"mode": "queue"}, "spool": {"directory": "spool"}, "status": {"address": "off"},
    }
    async with Gateway(load(values=values)) as gateway:
        (local,) = gateway.addresses["local"]
        client = await asyncio.to_thread(smtplib.SMTP, "127.0.0.1", local.port)
        await asyncio.to_thread(client.sendmail, "a@x.example", "b@x.example", "x")
        client.close()

asyncio.run(main())
print(sorted(name for name in sys.modules if name.startswith("otel_smtp.spool.outcomes") or name == "httpx"))
"""


def test_a_queue_without_receivers_imports_nothing_of_them(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (ran.stdout.decode().strip().splitlines() or [ran.stderr.decode()])[-1] == "[]"
