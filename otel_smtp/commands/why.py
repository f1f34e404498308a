"""`otel-smtp why`: the fate of a mail, from the running gateway and its queue."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from otel_smtp.commands.asking import AskedGateway, NoAnswer, running_gateway
from otel_smtp.commands.options import FAILED, console, fail, global_flags, global_options
from otel_smtp.config import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from otel_smtp.commands.terminal.account import Account

# Recent traces are searched until there are as many mails as are shown; a trace may hold many mails.
_TRACES_READ: Final = 100
_SHOWN_MAILS: Final = 5


class _Found(NamedTuple):
    """The results of a search.

    Attributes:
        mails: newest first.
        logged: those of them that only the log has.
        queued: messages in the queue, as `queue list --json` has them.
        searched: where, and since when, in words.
        notes: remarks about the search.
        problems: sources that could not be searched.
    """

    mails: Sequence["Account"]
    logged: Sequence["Account"]
    queued: Sequence[Mapping[str, Any]]
    searched: Sequence[str]
    notes: Sequence[str]
    problems: Sequence[str]


@click.command()
@click.argument("what", metavar="ADDRESS|DOMAIN|MESSAGE-ID|TRACE-ID|QUEUE-ID")
@click.option(
    "--most", "-n", default=_SHOWN_MAILS, show_default=True, type=click.IntRange(1, 1000), help="Mails to show."
)
@click.option(
    "--log", "logs", type=click.Path(path_type=Path), metavar="FILE", multiple=True,
    help="Look in this JSON log of the gateway too; repeatable.",
)  # fmt: skip
@click.option("--waterfall/--no-waterfall", default=None, help="Draw the trace; default: where one mail is found.")
@click.option(
    "--url",
    "urls",
    metavar="URL",
    multiple=True,
    help="Status port of the gateway; default: status.address of the settings; repeatable, for several gateways.",
)
@global_flags("Print one line of JSON per mail.")
@click.pass_context
def why(
    context: click.Context,
    *,
    what: str,
    most: int,
    logs: Sequence[Path],
    waterfall: bool | None,
    as_json: bool,
    urls: Sequence[str],
) -> None:
    """Explain what became of a mail, and why.

    It asks the running gateway for its recent traces, and the queue of the
    settings; with --log it looks in a log too, which needs no gateway. Part of
    an id is enough.

    Exit status: 0 found, 1 nothing found or no gateway answers, 2 wrong use or
    settings.
    """
    from otel_smtp.commands.terminal.account import account_lines, queued_lines

    if not what.strip():
        fail(2, "why: give an address, a domain or an id")
    settings = global_options(context).settings(needs_upstream=False)
    gateways = [running_gateway(settings, url) for url in dict.fromkeys(urls or (None,))]
    found = _find(settings, gateways, what.strip(), most, logs)
    if not found.mails and not found.queued:
        for problem in found.problems:
            click.echo(f"otel-smtp: why: {problem}", err=True)
        if not found.searched:
            raise SystemExit(FAILED)
        fail(FAILED, f"why: nothing found of {what}", *(f"searched {one}" for one in found.searched), *found.notes)
    if as_json:
        for mail in found.mails:
            click.echo(json.dumps({"from": "log" if mail in found.logged else "trace", **mail.as_json()}))
        for row in found.queued:
            click.echo(json.dumps({"from": "queue", **row}))
        return
    for note in (*found.notes, *found.problems):
        click.echo(f"otel-smtp: why: {note}", err=True)
    output = console()
    queued = {row["queue_id"]: queued_lines(row, time.time()) for row in found.queued}
    parts = [[*account_lines(mail), *queued.pop(mail.ids.get("queue_id", ""), ())] for mail in found.mails]
    for number, lines in enumerate([*parts, *queued.values()]):
        if number:
            output.print()
        for line in lines:
            output.print(line, soft_wrap=True)
    is_alone = len(found.mails) == 1
    if found.mails and (is_alone if waterfall is None else waterfall):
        _draw(output, found.mails)


def _draw(output: "Console", mails: Sequence["Account"]) -> None:
    from otel_smtp.commands.terminal.waterfall import ASCII, UNICODE, waterfall

    glyphs = UNICODE if output.encoding.lower().startswith("utf") else ASCII
    for mail in mails:
        output.print()
        for line in waterfall(mail.trace, width=max(40, output.width), glyphs=glyphs):
            output.print(line, no_wrap=True, overflow="ignore", crop=False)


def _find(settings: Settings, gateways: Sequence[AskedGateway], what: str, most: int, logs: Sequence[Path]) -> _Found:
    logged: list[Account] = []
    mails, searched, notes, problems = _in_traces(gateways, what, most)
    known = {mail.trace_id for mail in mails}
    if logs:
        try:
            of_logs = _in_logs(logs, what, most)
            logged = [mail for mail in of_logs if mail.trace_id not in known][: most - len(mails)]
            searched += [f"the log in {log}" for log in logs]
        except OSError as error:
            problems.append(f"{error.filename}: {error.strerror}")
    queued: list[Mapping[str, Any]] = []
    directory = settings.spool.directory
    if settings.spool.url is not None or (directory is not None and _may_exist(directory)):
        from otel_smtp.spool.messages import SpoolError

        try:
            queued = asyncio.run(_in_queue(settings, what, known))
            searched.append("the queue of all gateways" if directory is None else f"the queue in {directory}")
        except SpoolError as error:
            problems.append(f"the queue: {error}")
    return _Found([*mails, *logged], logged, queued, searched, notes, problems)


def _may_exist(directory: Path) -> bool:
    """Whether there is a queue to search; if this user may not look, the search reports it."""
    try:
        return directory.exists()
    except OSError:
        return True


def _in_traces(
    gateways: Sequence[AskedGateway], what: str, most: int
) -> tuple[Sequence["Account"], list[str], Sequence[str], list[str]]:
    """The mails found in traces, newest first; what was searched; notes; the gateways that did not answer.

    Joins the parts of a trace from several gateways.
    """
    from otel_smtp.commands.terminal.account import Account

    quoted = '"' + what.replace('"', "") + '"'
    mails: list[Account] = []
    searched: dict[str, str] = {}
    notes: dict[str, None] = {}
    problems: list[str] = []
    answering = list(gateways)
    # Recipients first: most questions are about one; then anything that holds the words.
    for query in (f"to:{quoted}", quoted):
        ended: dict[str, float] = {}
        for gateway in list(answering):
            try:
                ended |= _matching(gateway, query, searched, notes)
            except NoAnswer as error:
                problems.append(str(error))
                answering.remove(gateway)
        for trace_id in sorted(ended, key=lambda one: -ended[one])[:_TRACES_READ]:
            mails += reversed(_meant(_told(answering, trace_id, problems), what))
            if len(mails) >= most:
                break
        if mails:
            break
    return mails[:most], list(searched.values()), list(notes), list(dict.fromkeys(problems))


def _matching(
    gateway: AskedGateway, query: str, searched: dict[str, str], notes: dict[str, None]
) -> Mapping[str, float]:
    """A gateway's matching traces, and when they ended, if they have.

    Raises:
        NoAnswer: it cannot be asked.
    """
    found = gateway.ask("api", "traces", q=query)
    try:
        since = time.strftime("%d %b %H:%M:%S", time.localtime(found["complete_since_unix_milliseconds"] / 1000))
        searched[gateway.url] = f"{found['held']} traces of {gateway.url}, all since {since} and failures before"
        notes.update(dict.fromkeys(found["notes"]))
        return {one["trace_id"]: float(one["end_unix_milliseconds"]) for one in found["traces"]}
    except (ValueError, KeyError, TypeError) as error:
        raise _no_gateway(gateway, error) from error


def _told(gateways: Sequence[AskedGateway], trace_id: str, problems: list[str]) -> Sequence["Account"]:
    """The mails of a trace, with all gateways' parts of it; none if it has left memory meanwhile."""
    from otel_smtp.commands.terminal.account import accounts
    from otel_smtp.commands.terminal.otlp_spans import OtlpSpan, spans_of

    spans: list[OtlpSpan] = []
    for gateway in gateways:
        try:
            otlp = gateway.ask("api", "traces", trace_id)
            spans += spans_of(otlp) if otlp is not None else []
        except NoAnswer as error:
            problems.append(str(error))
        except (ValueError, KeyError, TypeError) as error:
            problems.append(str(_no_gateway(gateway, error)))
    spans.sort(key=lambda span: (span.start_ns, -span.end_ns))
    return accounts(spans) if spans else []


def _no_gateway(gateway: AskedGateway, error: Exception) -> NoAnswer:
    return NoAnswer(f"what answers at {gateway.url} is no gateway of this version: {error!r}")


def _in_logs(paths: Sequence[Path], what: str, most: int) -> list["Account"]:
    """The mails in all the JSON logs together, newest first.

    Raises:
        OSError: one cannot be read.
    """
    from otel_smtp.commands.terminal.account import accounts
    from otel_smtp.commands.terminal.log_spans import spans_of_lines

    text = what.lower().strip("<>")
    traces: dict[str, list[Mapping[str, Any]]] = {}
    # Of an address, its domain, if the log has no more of it.
    for sought in dict.fromkeys((text, text.rpartition("@")[2])):
        found: dict[str, str] = {}  # by trace, the time of its last line
        for line in _log_lines(paths, json.dumps(sought)[1:-1]):
            found[line["trace_id"]] = max(found.get(line["trace_id"], ""), str(line.get("timestamp", "")))
        traces = {trace_id: [] for trace_id in sorted(found, key=found.__getitem__)[-most:]}
        if traces:
            break
    # Other lines of a trace may be anywhere: an attempt from the queue is hours later.
    for line in _log_lines(paths, "") if traces else ():
        if line["trace_id"] in traces:
            traces[line["trace_id"]].append(line)
    mails: list[Account] = []
    for lines in traces.values():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # lines of another program
            mails += _meant(accounts(spans_of_lines(lines)), what)
    return sorted(mails, key=lambda mail: -mail.began_ns)[:most]


def _log_lines(paths: Sequence[Path], sought: str) -> Iterator[Mapping[str, Any]]:
    """The lines that belong to a trace, and have `sought`, in lower case, anywhere."""
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as log:
            for text in log:
                if '"trace_id"' in text and sought in text.lower():
                    try:
                        line = json.loads(text)
                    except ValueError:
                        continue
                    if isinstance(line, dict) and isinstance(line.get("trace_id"), str):
                        yield line


def _meant(mails: Sequence["Account"], what: str) -> Sequence["Account"]:
    """The mails of a trace that match; an address matches by its domain, if spans have no more of it."""
    text = what.lower().strip("<>")
    for sought in dict.fromkeys((text, text.rpartition("@")[2])):
        if wanted := [mail for mail in mails if mail.holds(sought)]:
            return wanted
    return mails


async def _in_queue(settings: Settings, what: str, trace_ids: set[str]) -> list[Mapping[str, Any]]:
    """The queued messages that match, or that belong to one of the traces.

    Raises:
        SpoolError: the queue cannot be read.
    """
    from otel_smtp.commands.queue import ask_queue

    needle = what.lower().strip("<>")
    found: list[Mapping[str, Any]] = []
    async for row in ask_queue(settings.spool.directory, settings.spool, {"command": "list"}):
        people = [row["sender"], *(one["address"] for one in row["recipients"])]
        if (
            needle in row["queue_id"].lower()
            or (row["trace_id"] is not None and (needle in row["trace_id"] or row["trace_id"] in trace_ids))
            or any(_is_of(needle, person.lower()) for person in people)
        ):
            found.append(row)
    return found


def _is_of(needle: str, address: str) -> bool:
    """Whether an address is the wanted one, or belongs to the wanted domain."""
    return address == needle or address.rpartition("@")[2] == needle.removeprefix("@")
