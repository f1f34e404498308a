"""Operators' commands on the spool: requested over a unix socket of the gateway that owns it, or run here if none does.

A request is one line of JSON; the answer is one line of JSON per message, then a last one with `done` or `error`. The
socket is in the spool's directory, which only the gateway's user can access; a user who can reach it could read the
mail anyway.

Nothing vanishes without a record: removed messages are logged, and their recipients counted.
"""

import asyncio
import base64
import contextlib
import json
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from otel_smtp.observing import Observer
from otel_smtp.spool.deeds import CRASHES, Deed, note_crashes, operator_name
from otel_smtp.spool.messages import (
    OUTCOME_PREFIX,
    ContentLost,
    DeliveryState,
    End,
    MessageView,
    NoSuchMessage,
    SpoolError,
    trace_id_of,
)
from otel_smtp.spool.store import Store, Woken

logger: Final = logging.getLogger("otel_smtp.spool.operators")

PAGE: Final = 200  # messages read at a time: mail must not wait for a long list
PIECE_OCTETS: Final = 48 * 1024  # of content, in a line of an answer
MOST_FOUND: Final = 1000
MOST_REQUEST_OCTETS: Final = 4 * 1024 * 1024
MOST_CONVERSATIONS: Final = 16
REQUEST_SECONDS: Final = 10.0
"""A command is sent in one go."""
ANSWER_SECONDS: Final = 60.0
"""Time for a client to read a piece of the answer. The work itself may take long."""
COMMANDS: Final = (
    "list",
    "find",
    "show",
    "retry",
    "hold",
    "release",
    "expire",
    "delete",
    "reset",
    "export",
    "counts",
    "rebuild",
)

# The ends of all recipients ever accepted, as `counts` shows them, including zeros.
TALLIED: Final = ("accepted", *(end.value for end in End))

Answer = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Filter:
    """The messages that an operator means: those that match every given condition.

    Attributes:
        domain: of a recipient; case does not matter.
        sender: the envelope's sender, "@domain", or "<>" for the null path.
        reason: part of the last reply to a recipient; case does not matter.
        came_before: seconds since the epoch.
    """

    domain: str | None = None
    sender: str | None = None
    reason: str | None = None
    came_before: float | None = None

    @classmethod
    def of(cls, request: Answer) -> Self:
        """The filter of a request.

        Raises:
            SpoolError: it is not understood.
        """
        texts = [request.get(name) for name in ("domain", "sender", "reason")]
        older_than = request.get("older_than_seconds")
        if not all(one is None or isinstance(one, str) for one in texts) or not (
            older_than is None or isinstance(older_than, (int, float))
        ):
            raise SpoolError("domain, sender and reason are text, older_than_seconds is a number")
        domain, sender, reason = (one.lower() if one is not None else None for one in texts)
        came_before = None if older_than is None else time.time() - older_than
        return cls(domain and domain.removeprefix("@"), "" if sender == "<>" else sender, reason, came_before)

    def fits(self, shown: MessageView) -> bool:
        """Whether a message matches."""
        if self.came_before is not None and shown.arrived_at > self.came_before:
            return False
        if self.sender is not None:
            sender = shown.reverse_path.lower()
            if sender != self.sender and not (self.sender.startswith("@") and sender.endswith(self.sender)):
                return False
        return (
            self.domain is None
            or any(address.lower().rpartition("@")[2] == self.domain for address, _, _ in shown.recipients)
        ) and (self.reason is None or any(self.reason in last.lower() for _, _, last in shown.recipients))


class Operations:
    """The operators' commands.

    Args:
        runner: works on the queue, and reports operators' changes.
        max_age_seconds: the new lifetime of a message after `reset`.

    Attributes:
        outcomes_changed: called when an operator has changed some.
    """

    def __init__(self, store: Store, runner: Woken, *, max_age_seconds: float) -> None:
        self._store = store
        self._runner = runner
        self._max_age_seconds = max_age_seconds
        self.outcomes_changed: Callable[[], None] = lambda: None

    async def run(self, request: Answer) -> AsyncIterator[Answer]:
        """Run one command.

        Args:
            request: `command`; `ids`, or `all`; for `find`, the known facts: `trace_id`, `sender`, `recipient`. For
                `list`, and for changes with `all`, a filter (see `Filter`): `domain`, `sender`, `reason`,
                `older_than_seconds`; `outcomes`: outcomes for receivers instead of mail. For changes, `operator`: the
                operator's name.

        Raises:
            SpoolError: it is not understood, or the spool failed.
        """
        match request.get("command"):
            case "counts":
                yield await self._counts()
            case "rebuild":
                async for answer in self._rebuild():
                    yield answer
            case "list":
                wanted = Filter.of(request)
                async for listed in self._all(outcomes=bool(request.get("outcomes"))):
                    if wanted.fits(listed):
                        yield as_answer(listed)
            case "find":
                trace_id, sender, recipient = _known(request)
                found = await self._store.find(trace_id=trace_id, sender=sender, recipient=recipient, most=MOST_FOUND)
                for shown in found:
                    yield as_answer(shown)
            case "show":
                for message_id in _ids(request):
                    yield as_answer(await self._store.show(message_id))
            case "export":
                async for answer in self._export(request):
                    yield answer
            case "retry" | "hold" | "release" | "expire" | "delete" | "reset" as command:
                async for answer in self._change(command, request):
                    yield answer
            case command:
                raise SpoolError(f"no command {command!r}; there are {', '.join(COMMANDS)}")

    async def _rebuild(self) -> AsyncIterator[Answer]:
        rebuilt = await self._store.rebuild()
        for told in rebuilt.told:
            logger.warning(told)
            yield {"told": told}
        for one in rebuilt.not_found:
            logger.critical("content of queued message not found", extra={"spool_id": one.id, "reason": one.reason})
            yield {
                "queue_id": one.id,
                "sender": one.reverse_path,
                "recipients": list(one.recipients),
                "reason": one.reason,
                "queue_name": "corrupt" if one.is_queued else None,
            }

    async def _counts(self) -> Answer:
        counts, tally = await self._store.counts(), await self._store.tally()
        answer: dict[str, Any] = {
            **counts.by_state(),
            "oldest_arrival_time": counts.oldest_arrived_at,
            "recipients": {name: tally.get(name, 0) for name in TALLIED} | dict(tally),
        }
        if destinations := await self._store.destinations(outcomes=True):
            backlog = await self._store.backlog(destinations)
            answer["outcomes"] = {
                destination.removeprefix(OUTCOME_PREFIX): {
                    "pending": one.pending,
                    "oldest_arrival_time": one.oldest_arrived_at,
                }
                for destination, one in backlog.items()
            }
        return answer

    async def _all(self, *, outcomes: bool) -> AsyncIterator[MessageView]:
        after = ""
        while page := await self._store.page(after, PAGE, outcomes=outcomes):
            for shown in page:
                yield shown
            after = page[-1].id

    async def _export(self, request: Answer) -> AsyncIterator[Answer]:
        is_all = bool(request.get("all"))
        # Collect the ids first, as below.
        ids = [shown.id async for shown in self._all(outcomes=False)] if is_all else _ids(request)
        for message_id in ids:
            try:
                shown = await self._store.show(message_id)
                yield as_answer(shown)
                for start in range(0, shown.content.octets, PIECE_OCTETS):
                    piece = await self._store.read(shown.content, start, PIECE_OCTETS)
                    yield {"queue_id": message_id, "content": base64.b64encode(piece).decode("ascii")}
            except (NoSuchMessage, ContentLost) as error:  # which says nothing about the following ones
                if await self._is_there(message_id) or not is_all:  # otherwise it has ended meanwhile
                    yield {"queue_id": message_id, "error": str(error)}

    async def _is_there(self, message_id: str) -> bool:
        try:
            await self._store.show(message_id)
        except NoSuchMessage:
            return False
        return True

    async def _change(self, command: str, request: Answer) -> AsyncIterator[Answer]:
        operator = operator_name(str(request.get("operator") or ""))
        is_all = bool(request.get("all"))
        if is_all:
            # Collect the ids first: a message that arrives meanwhile was not meant.
            wanted = Filter.of(request)
            everything = self._all(outcomes=bool(request.get("outcomes")))
            ids = [shown.id async for shown in everything if _concerns(command, shown) and wanted.fits(shown)]
        else:
            ids = list(_ids(request))
        yield {"messages": len(ids)}
        for message_id in ids:
            try:
                before = await self._store.show(message_id)
                changed = await self._do(command, message_id)
            except SpoolError as error:
                if is_all and isinstance(error, NoSuchMessage):  # it has ended meanwhile
                    yield {"queue_id": message_id, "changed": False}
                else:
                    yield {"queue_id": message_id, "error": str(error)}
                continue
            if changed:
                self._runner.note(Deed.of(command, operator, before).as_text())
            yield {"queue_id": message_id, "changed": bool(changed)}
        if command == "expire":
            self._runner.look_soon()
        else:
            self._runner.wake()
        self.outcomes_changed()

    def _do(self, command: str, message_id: str) -> Awaitable[int]:
        store = self._store
        match command:
            case "retry":
                return store.retry(message_id)
            case "hold":
                return store.hold(message_id)
            case "release":
                return store.release(message_id)
            case "expire":
                return store.expire(message_id)
            case "delete":
                return store.delete(message_id)
            case _:
                return store.reset(message_id, self._max_age_seconds)


def _concerns(command: str, shown: MessageView) -> bool:
    """Whether `command` with `all` applies to this message."""
    if command == "release":
        return shown.state in (DeliveryState.HELD, DeliveryState.CORRUPT)
    return command == "delete" or shown.state is not DeliveryState.CORRUPT


def _ids(request: Answer) -> Sequence[str]:
    ids = request.get("ids")
    if not isinstance(ids, list) or not ids or not all(isinstance(one, str) for one in ids):
        raise SpoolError("which messages? give their ids")
    return ids


def _known(request: Answer) -> Sequence[str | None]:
    known = [request.get(name) for name in ("trace_id", "sender", "recipient")]
    if not any(known) or not all(one is None or isinstance(one, str) for one in known):
        raise SpoolError("which messages? give their trace id, sender or recipient")
    trace_id, sender, recipient = known
    return trace_id, "" if sender == "<>" else sender, recipient


def as_answer(shown: MessageView) -> Answer:
    """A message for operators' tools; names follow Postfix's `postqueue -j` where it has them."""
    return {
        "queue_name": _queue_name(shown),
        "queue_id": shown.id,
        "kind": shown.kind.value,
        "state": shown.state.value,
        "arrival_time": shown.arrived_at,
        "expires": shown.expires_at,
        "forced_expire": shown.is_forced_to_expire,
        "message_size": shown.octets,
        "sender": shown.reverse_path,
        "recipients": [
            {"address": address, "state": state.value, **({"delay_reason": last} if last else {})}
            for address, state, last in shown.recipients
        ],
        "attempts": shown.attempts,
        "next_attempt": shown.next_attempt_at,
        "gateway": ", ".join(shown.gateways) or None,
        "since": shown.leased_at,
        "trace_id": trace_id_of(shown.carrier),
    }


def _queue_name(shown: MessageView) -> str:
    match shown.state:
        case DeliveryState.LEASED:
            return "active"
        case DeliveryState.HELD:
            return "hold"
        case DeliveryState.CORRUPT:
            return "corrupt"
        case DeliveryState.READY:
            return "deferred" if shown.attempts else "incoming"


# Over the socket ----------------------------------------------------------------------------------------------


class ControlSocket:
    """Listens for operators' commands while the gateway runs."""

    def __init__(self, path: Path, operations: Operations) -> None:
        self._path = path
        self._operations = operations
        self._server: asyncio.AbstractServer | None = None
        self._conversations: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: it cannot be bound.
        """
        try:
            if not stat.S_ISSOCK(self._path.lstat().st_mode):
                logger.error("queue commands unavailable: not a socket", extra={"path": str(self._path)})
                return
            self._path.unlink()  # we own the directory, so its process has died
        except FileNotFoundError:
            pass
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _reachable(self._path) as address:
                sock.bind(address)
            self._path.chmod(0o600)
            self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=MOST_REQUEST_OCTETS)
        except BaseException:
            sock.close()
            raise

    async def stop(self) -> None:
        """Stop. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)
        for conversation in list(self._conversations):
            conversation.cancel()
        await asyncio.gather(*self._conversations, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._conversations) >= MOST_CONVERSATIONS:
            writer.write(json.dumps({"error": "too many queue commands at once"}).encode() + b"\n")
            writer.close()
            return
        self._conversations.add(task)
        try:
            with contextlib.suppress(OSError):  # TimeoutError, too
                await self._converse(reader, writer)
        except Exception:
            logger.exception("queue command failed")
        finally:
            self._conversations.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                line = await reader.readline()
            request = json.loads(line or b"null")
            if not isinstance(request, dict):
                raise SpoolError("a command is a JSON object")
            async for answer in self._operations.run(request):
                writer.write(json.dumps(answer).encode() + b"\n")
                async with asyncio.timeout(ANSWER_SECONDS):
                    await writer.drain()
            last: Answer = {"done": True}
        except (SpoolError, ValueError) as error:
            last = {"error": str(error)}
        writer.write(json.dumps(last).encode() + b"\n")
        await writer.drain()


async def ask(
    socket_path: Path, request: Answer, *, max_age_seconds: float, here: Callable[[], Store]
) -> AsyncIterator[Answer]:
    """Let the gateway that listens at `socket_path` run a command, or run it here if there is none.

    Args:
        here: makes the store, not opened yet.

    Raises:
        SpoolError: what went wrong.
    """
    try:
        with _reachable(socket_path) as address:
            reader, writer = await asyncio.open_unix_connection(address, limit=MOST_REQUEST_OCTETS)
    except (FileNotFoundError, ConnectionRefusedError):  # the latter also if there is no socket
        async for answer in _do_here(here(), request, max_age_seconds=max_age_seconds):
            yield answer
        return
    except OSError as error:
        raise SpoolError(f"{socket_path}: {error.strerror}") from error
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        while line := await reader.readline():
            answer = json.loads(line)
            if answer.get("done"):
                return
            if "error" in answer and "queue_id" not in answer:
                raise SpoolError(answer["error"])
            yield answer
        raise SpoolError("the gateway closed the connection early")
    finally:
        writer.close()


async def _do_here(store: Store, request: Answer, *, max_age_seconds: float) -> AsyncIterator[Answer]:
    recovery = await store.open()
    if recovery.lost:
        logger.critical("queued contents missing", extra={"spool_ids": list(recovery.lost)})
    for alarm in recovery.alarms:
        logger.critical(alarm)
    told = KeptDeeds()
    try:
        for message_id in recovery.held:
            held = await store.show(message_id)
            note_crashes(held, Observer())
            await store.tell_deed(Deed.of("hold", CRASHES, held).as_text())
        async for answer in Operations(store, told, max_age_seconds=max_age_seconds).run(request):
            for deed in told.deeds:
                await store.tell_deed(deed)
            told.deeds.clear()
            yield answer
    finally:
        await store.close()


class KeptDeeds:
    """Operators' changes, for the next gateway to report."""

    def __init__(self) -> None:
        self.deeds: list[str] = []

    def wake(self, destinations: Sequence[str] = ()) -> None:
        """No runner works on the queue."""

    def look_soon(self) -> None:
        """As above."""

    def note(self, deed: str) -> None:
        """Log it here, and keep it."""
        Deed.parse(deed).note(Observer())
        self.deeds.append(deed)

    def note_crashes(self, message_ids: Sequence[str]) -> None:
        """See `_do_here`, which reports them."""


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """A name of the socket that the kernel accepts: at most 107 octets, however deep the directory is."""
    if len(os.fsencode(path)) <= 107:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
