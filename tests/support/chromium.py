"""A headless Chromium in a test's hands, spoken to over its debugging pipe: no driver, no port, no download."""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

PROGRAM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_FLAGS: Final = (
    "--headless",
    "--no-sandbox",  # tests may run as root, where Chromium refuses its sandbox; it loads our own page only
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
_SECONDS: Final = 20.0


class PageError(Exception):
    """The browser answered with an error, or a script threw."""


class Page:
    """One page. `problems` collects exceptions, console errors and violations of the page's policy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._session: str | None = None
        self._loaded = asyncio.Event()
        self.problems: deque[str] = deque(maxlen=50)
        self._reading = asyncio.create_task(self._read())

    async def open(self, url: str, *, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        """Show `url` and wait until it is loaded."""
        if self._session is None:
            target = await self.call("Target.createTarget", url="about:blank")
            attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        async with asyncio.timeout(_SECONDS):
            await self._loaded.wait()

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for.

        Raises:
            PageError: it threw.
        """
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise PageError(answer["exceptionDetails"])
        return answer["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until a JavaScript expression is true.

        Raises:
            TimeoutError: it never was.
        """
        async with asyncio.timeout(_SECONDS):
            while not await self.evaluate(f"Boolean({script})"):
                await self.evaluate("new Promise((done) => setTimeout(done, 10))")

    async def press(self, key: str, *, times: int = 1) -> None:
        """Press a key, as "Tab", "ArrowRight", "Enter", "j", where the focus is."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38}
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                await self.call(
                    "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes.get(key, 0),
                    **(text if kind == "keyDown" else {}),
                )  # fmt: skip

    async def type(self, text: str) -> None:
        """Type into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def hover(self, selector: str) -> None:
        """Move the mouse to the middle of an element.

        The page lives: an element may move between the look at its place and the mouse's arrival. So the browser is
        asked whether the mouse is on it, and it is brought there again until it is.
        """
        async with asyncio.timeout(_SECONDS):
            while True:
                await self._mouse("mouseMoved", await self._middle(selector))
                if await self.evaluate(f"document.querySelector({json.dumps(selector)}).matches(':hover')"):
                    return

    async def click(self, selector: str) -> None:
        """Click the middle of an element; see `hover`."""
        noted = f"""document.addEventListener("click", (event) => {{
            window.clicked = event.target.closest({json.dumps(selector)}) !== null;
        }}, {{capture: true, once: true}})"""
        async with asyncio.timeout(_SECONDS):
            while True:
                await self.hover(selector)
                middle = await self._middle(selector)
                await self.evaluate(f"void (window.clicked = false, {noted})")
                for kind in ("mousePressed", "mouseReleased"):
                    await self._mouse(kind, middle, button="left", clickCount=1)
                if await self.evaluate("window.clicked"):
                    return

    async def screenshot(self, path: Path, *, full: bool = False) -> None:
        """Write what is shown, or the full page, as PNG."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(answer["data"]))

    async def call(self, method: str, **parameters: Any) -> Any:
        """One call of the debugging protocol.

        Raises:
            PageError: the browser refused it.
        """
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None and not method.startswith("Browser."):
            message["sessionId"] = self._session
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._writer.write(json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(_SECONDS):
            return await answer

    async def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(PageError, OSError, TimeoutError):
            await self.call("Browser.close")
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()

    async def _middle(self, selector: str) -> Mapping[str, float]:
        box: Mapping[str, float] = await self.evaluate(
            f"""(async () => {{
                const target = document.querySelector({json.dumps(selector)});
                const frame = () => new Promise((done) => setTimeout(() => requestAnimationFrame(done), 20));
                for (let before = "";;) {{
                    target.scrollIntoView({{block: "center", behavior: "instant"}});
                    await frame();  // where it is once it has come to rest
                    const box = target.getBoundingClientRect();
                    if (JSON.stringify(box) === before) return {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
                    before = JSON.stringify(box);
                }}
            }})()"""
        )
        return box

    async def _mouse(self, kind: str, at: Mapping[str, float], **more: Any) -> None:
        await self.call("Input.dispatchMouseEvent", type=kind, x=at["x"], y=at["y"], **more)

    async def _read(self) -> None:
        while True:
            try:
                message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            except asyncio.IncompleteReadError:
                return
            if "id" in message:
                answer = self._waiting.pop(message["id"])
                if answer.done():
                    continue
                if "error" in message:
                    answer.set_exception(PageError(message["error"]))
                else:
                    answer.set_result(message["result"])
            else:
                self._on_event(message["method"], message["params"])

    def _on_event(self, method: str, parameters: Any) -> None:
        match method:
            case "Page.loadEventFired":
                self._loaded.set()
            case "Runtime.exceptionThrown":
                self.problems.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning"):
                self.problems.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.problems.append(str(parameters["entry"]))


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Page]:
    """A browser with one page, and its own empty profile."""
    assert PROGRAM is not None
    loop = asyncio.get_running_loop()
    their_input, our_output = os.pipe()
    our_input, their_output = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        # The browser reads its file 3 and writes its file 4; bash puts the pipes there.
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", f'exec "$@" 3<&{their_input} 4>&{their_output}', "bash",
            PROGRAM, *_FLAGS, f"--user-data-dir={profile}",
            pass_fds=(their_input, their_output), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        os.close(their_input)
        os.close(their_output)
        reader = asyncio.StreamReader(limit=64 * 1024 * 1024)
        read_pipe = os.fdopen(our_input, "rb", 0)
        reading, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), read_pipe)
        writing, protocol = await loop.connect_write_pipe(
            asyncio.streams.FlowControlMixin, os.fdopen(our_output, "wb", 0)
        )
        page = Page(reader, asyncio.StreamWriter(writing, protocol, None, loop))
        try:
            yield page
        finally:
            await page.close()
            reading.close()
            try:
                async with asyncio.timeout(5):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
