"""Makes the README's pictures out of the demo: `python -m tests.pictures`. Needs Chromium; look at them afterwards."""

import asyncio
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.support.chromium import chromium
from tests.support.ports import unclaimed_port

PICTURES: Final = Path(__file__).parent.parent / "deploy" / "pictures"
_REFUSED: Final = re.compile(r"^3 .*?^trace ([0-9a-f]{32})", re.MULTILINE | re.DOTALL)
_SECTION: Final = "[...document.querySelectorAll('section')].find((one) => one.innerText.includes('Recent traces'))"


async def make() -> None:
    """Photograph the page of a demo: the recent traces, and the trace of the mail with a refused recipient."""
    page_port, smtp_port = unclaimed_port(), unclaimed_port()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "otel_smtp", "demo", "--listen", f"127.0.0.1:{smtp_port}",
                "--set", f"status.address=127.0.0.1:{page_port}", "--set", "hostname=gw.example.com",
            ],
            stdin=subprocess.DEVNULL, stdout=told, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            said = trace_id = ""
            async with asyncio.timeout(60):
                while not trace_id or "\n4 " not in said:
                    await asyncio.sleep(0.2)
                    told.seek(0)
                    said = told.read()
                    trace_id = found[1] if (found := _REFUSED.search(said)) else ""
            async with chromium() as page:
                await page.open(f"http://127.0.0.1:{page_port}/", width=1200, height=900)
                await page.until("document.body.innerText.includes('550')")
                await page.screenshot(PICTURES / "page.png")
            async with chromium() as page:
                await page.open(f"http://127.0.0.1:{page_port}/#trace={trace_id}", width=1200, height=860)
                await page.until(f"document.body.innerText.includes('{trace_id[:16]}')")
                await page.evaluate(f"({_SECTION}).scrollIntoView()")
                await page.screenshot(PICTURES / "waterfall.png")
        finally:
            process.terminate()
            process.wait(30)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    asyncio.run(make())
