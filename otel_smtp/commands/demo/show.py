"""The demonstration: an upstream, a gateway, visits, and each trace drawn when its connection ends."""

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from otel_smtp.commands.demo.upstream import REFUSED_ADDRESS, KeepingForwarder, KeepingUpstream
from otel_smtp.commands.demo.visits import VISITS
from otel_smtp.commands.terminal.spans import DrawnSpan, Stories
from otel_smtp.commands.terminal.waterfall import ASCII, UNICODE, waterfall
from otel_smtp.config import Flag, Settings, load
from otel_smtp.gateway import Gateway
from otel_smtp.gateway.ports import bind
from otel_smtp.net import CannotListen
from otel_smtp.observing import Endpoint

# A trace is drawn when its connection, and so the visit, has ended.
_PATIENCE_SECONDS: Final = 20.0
# Traces waiting to be drawn; of a load test on the demonstration, not all are.
_MOST_STORIES: Final = 1000


class Demonstration:
    """Draws what the gateway does.

    Args:
        console: where it draws.
        as_json: print only a line of JSON for each trace.
        listen: addresses to listen on; (): the default ones, or another port if that is taken.
        flags: further settings.
        answer_after_seconds: how long the upstream takes to answer each message.
    """

    def __init__(
        self,
        console: Console,
        *,
        as_json: bool = False,
        listen: Sequence[str] = (),
        flags: Sequence[Flag] = (),
        answer_after_seconds: float = 0.0,
    ) -> None:
        self._console = console
        self._as_json = as_json
        self._listen = listen
        self._flags = flags
        self._upstream = KeepingUpstream(KeepingForwarder(answer_after_seconds=answer_after_seconds))
        self._stories = Stories()
        self._ended: asyncio.Queue[list[DrawnSpan]] = asyncio.Queue(_MOST_STORIES)
        self._missed = 0

    async def run(self, *, once: bool) -> None:
        """Show the visits; then draw every further connection until SIGINT or SIGTERM, unless `once`.

        Raises:
            SettingsError: the settings are invalid.
            OSError: an address cannot be bound.
            VisitFailed: the gateway did not answer as it should.
        """
        upstream = await self._upstream.start()
        try:
            gateway = await self._started(upstream)
            async with contextlib.AsyncExitStack() as running:
                running.push_async_callback(gateway.stop)
                address = gateway.addresses["local"][0]
                if not self._as_json:
                    self._say_where(gateway, upstream)
                for number, visit in enumerate(VISITS, 1):
                    await visit.pay(address)
                    async with asyncio.timeout(_PATIENCE_SECONDS):
                        story = await self._ended.get()
                    self._draw(f"{number}  {visit.title}", story)
                if not once:
                    if not self._as_json:
                        self._invite(address)
                    await self._draw_until_signal()
        finally:
            await self._upstream.stop()

    async def _started(self, upstream: Endpoint) -> Gateway:
        """Start a gateway. If a port has been taken since it was found free, the kernel chooses another."""
        for listen, status in (
            (default_addresses(2525), default_addresses(9925)[0]),
            (["127.0.0.1:0"], "127.0.0.1:0"),
        ):
            gateway = Gateway(self._settings(upstream, self._listen or listen, status), span_sinks=[self])
            try:
                await gateway.start()
            except CannotListen as error:
                fault = error
            else:
                return gateway
        raise fault

    def _settings(self, upstream: Endpoint, listen: Sequence[str], status: str) -> Settings:
        # Without the environment on purpose: an upstream named there is real, and would get the visitors' mail.
        return load(
            values={
                "upstream": [{"name": "keeper", "url": f"smtp://{upstream}"}],
                "status": {"address": status},
                "timeouts": {"shutdown_grace": "1s"},  # for Ctrl-C
            },
            listen=listen,
            flags=self._flags,
            is_command=True,
        )

    def take(self, span: DrawnSpan) -> None:
        """Take a finished span from the gateway."""
        story = self._stories.take(span)
        if story is not None:
            try:
                self._ended.put_nowait(story)
            except asyncio.QueueFull:
                self._missed += 1

    async def _draw_until_signal(self) -> None:
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked.set)
        drawing = loop.create_task(self._draw_further())
        try:
            await asked.wait()
        finally:
            drawing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await drawing

    async def _draw_further(self) -> None:
        number = len(VISITS)
        while True:
            story = await self._ended.get()
            number += 1
            self._draw(f"{number}  Yours", story)
            if self._missed and not self._as_json:
                self._console.print(f"({self._missed} more connections were not drawn)", style="dim")
                self._missed = 0

    # Output

    def _say_where(self, gateway: Gateway, upstream: Endpoint) -> None:
        ready = gateway.ready
        where = " ".join(str(address) for address in ready.addresses["local"])
        self._say("gateway", (where, "bold"), "  accepts mail")
        self._say("upstream", str(upstream), f"  keeps mail, refuses {REFUSED_ADDRESS}")
        if ready.status is not None:
            self._say("page", (f"http://{ready.status}", "bold"), "  shows connections and traces as they happen")
        self._say("traces", f"below; exported to {ready.traces_to}")

    def _say(self, head: str, *parts: str | tuple[str, str]) -> None:
        self._console.print(Text.assemble((head.ljust(10), "dim"), *parts), soft_wrap=True)

    def _draw(self, title: str, story: Sequence[DrawnSpan]) -> None:
        console = self._console
        if self._as_json:
            print(
                json.dumps({"title": title, "spans": [_as_json(span) for span in story]}), file=console.file, flush=True
            )
            return
        console.print()
        console.rule(Text(title, "bold"), align="left", characters="─" if self._has_unicode else "-", style="dim")
        glyphs = UNICODE if self._has_unicode else ASCII
        for line in waterfall(story, width=max(40, console.width), glyphs=glyphs):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)

    @property
    def _has_unicode(self) -> bool:
        return self._console.encoding.lower().startswith("utf")

    def _invite(self, address: Endpoint) -> None:
        console = self._console
        console.print()
        console.print("Now you: each connection is drawn when it ends; Ctrl-C exits.", style="bold")
        for line in invitations(called_as(), address):
            console.print(f"  {line}", style="cyan", soft_wrap=True)


def _as_json(span: DrawnSpan) -> dict[str, Any]:
    """A span for JSON; times are nanoseconds since the epoch."""
    return {
        "name": span.name,
        "trace_id": f"{span.context.trace_id:032x}",
        "span_id": f"{span.context.span_id:016x}",
        "parent_span_id": f"{span.parent.span_id:016x}" if span.parent is not None else None,
        "start_unix_nano": span.start_ns,
        "end_unix_nano": span.end_ns,
        "attributes": dict(span.attributes),
        "events": [
            {"name": event.name, "time_unix_nano": event.time_ns, "attributes": dict(event.attributes)}
            for event in span.events
        ],
    }


def invitations(program: str, address: Endpoint) -> list[str]:
    """Command lines that work on this machine and send a mail to `address`.

    Args:
        program: how to call this program, see `called_as`.
    """
    lines = [f"{program} send --to you@example.net {address}"]
    if shutil.which("swaks") is not None:
        lines.append(f"swaks --server {address} --from me@example.org --to {REFUSED_ADDRESS}")
    else:
        lines.append(f"{program} send --to {REFUSED_ADDRESS} {address}")
    if shutil.which("curl") is not None:
        envelope = "--mail-from me@example.org --mail-rcpt you@example.net"
        lines.append(rf"printf 'Subject: Hello\r\n\r\nHi\r\n' | curl smtp://{address} {envelope} -T -")
    return lines


def called_as() -> str:
    """How to call this program again in the same shell: as the user did."""
    path = sys.argv[0]
    name = os.path.basename(path)
    if name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m otel_smtp"
    found = shutil.which(name)
    is_found = found is not None and os.path.exists(path) and os.path.samefile(found, path)
    return name if is_found else shlex.quote(path)


def default_addresses(port: int) -> list[str]:
    """`port` on the loopback addresses, if it is free; else a port that the kernel chooses."""
    free = [host for host in ("127.0.0.1", "::1") if _is_free(host, port)]
    return [str(Endpoint(host, port)) for host in free] if "127.0.0.1" in free else ["127.0.0.1:0"]


def _is_free(host: str, port: int) -> bool:
    try:
        bind(Endpoint(host, port)).close()
    except OSError:  # taken, or a machine without IPv6
        return False
    return True
