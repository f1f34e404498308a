"""`otel-smtp tail`: the mails of a running gateway as they happen, a line each."""

import json
import os
import re
import signal
import sys
import time
from datetime import UTC, datetime
from typing import Any, Final

import click

from otel_smtp.commands.asking import AskedGateway, NoAnswer, running_gateway, url_option
from otel_smtp.commands.options import FAILED, WRONG, fail, global_flags, global_options
from otel_smtp.observing import Fate, Outcome

# A request waits for ten seconds in the gateway, and a gateway that is busy may take its time.
_ANSWER_SECONDS: Final = 30.0
# Between two attempts at a gateway that has gone: nothing reports that it is back.
_AGAIN_SECONDS: Final = 1.0
# A reply code, a class of them, an enhanced code or its beginning.
_CODE: Final = re.compile(r"[2-5](?:[0-9]{2}|xx|yz)?|[245]\.[0-9]{1,3}(?:\.[0-9]{1,3})?", re.IGNORECASE)


@click.command()
@click.option("--to", metavar="ADDRESS|DOMAIN", help="Only mails with such a recipient.")
@click.option("--from", "sender", metavar="ADDRESS|DOMAIN", help="Only mails of such a sender.")
@click.option("--code", metavar="CODE", help="Only with this reply: 550, 5xx, 5.1.1.")
@click.option("--text", metavar="TEXT", help="Only where an upstream said this, or why something failed.")
@click.option(
    "--outcome",
    "outcomes",
    multiple=True,
    type=click.Choice(list(dict.fromkeys(one.value for one in (*Outcome, *Fate)))),
    help="Only what ended so; repeatable.",
)
@click.option("--errors", is_flag=True, help="Only what was not relayed or queued.")
@click.option("--lines", "-n", "most", metavar="N", type=click.IntRange(min=1), help="End after N lines.")
@url_option
@global_flags("Print one line of JSON per mail.")
@click.pass_context
def tail(
    context: click.Context,
    *,
    to: str | None,
    sender: str | None,
    code: str | None,
    text: str | None,
    outcomes: tuple[str, ...],
    errors: bool,
    most: int | None,
    as_json: bool,
    url: str | None,
) -> None:
    """Print a line per mail as it happens.

    The lines are those of the gateway's log on a terminal: time, mark, reply,
    sender's domain and recipients', upstream, duration, what the upstream
    said, trace id. Marks: + relayed, = queued, % relayed in part, x refused,
    ~ deferred, - aborted, ? unknown.

    Ctrl-C or SIGTERM ends it. A gateway that goes away is waited for.

    Exit status: 0 ended by you, or after -n lines; 1 no gateway answers;
    2 wrong use or settings.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which a shell's background jobs ignore
    if code is not None and _CODE.fullmatch(code) is None:
        fail(WRONG, f'--code = "{code}": allowed: a reply code as 550, a class as 5xx, an enhanced code as 5.1.1')
    settings = global_options(context).settings(needs_upstream=False)
    gateway = running_gateway(settings, url)
    only = [*outcomes, *(["errors"] if errors else [])]
    words = {"to": to, "from": sender, "code": code, "text": text}
    query = " ".join(f'{field}:"{_unquoted(value)}"' for field, value in words.items() if value)
    # https://no-color.org: whatever its value, unless it is empty.
    printing = _Printing(as_json=as_json, colors=sys.stdout.isatty() and not os.environ.get("NO_COLOR"), most=most)
    try:
        _follow(gateway, {"q": query, **({"only": ",".join(only)} if only else {})}, printing)
    except NoAnswer as error:
        fail(FAILED, f"tail: {error}")
    except (KeyboardInterrupt, BrokenPipeError):
        # The pipe's reader has gone: so must what Python would flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unquoted(text: str) -> str:
    return text.replace('"', "")


class _Printing:
    """Prints lines.

    Args:
        most: the most lines; None: no bound.
    """

    def __init__(self, *, as_json: bool, colors: bool, most: int | None) -> None:
        self._as_json = as_json
        self._colors = colors
        self._left = most

    def lines(self, answer: dict[str, Any]) -> bool:
        """Print those of an answer; whether more are wanted."""
        if answer["missed"]:
            self.say(f"{answer['missed']} lines were missed: they came faster than they were read")
        for line in answer["lines"]:
            click.echo(self._shown(line), color=True)
            if self._left is not None:
                self._left -= 1
                if self._left == 0:
                    return False
        return True

    def say(self, words: str) -> None:
        """Print a remark on standard error."""
        click.echo(f"otel-smtp: tail: {words}", err=True)

    def _shown(self, line: dict[str, Any]) -> str:
        if self._as_json:
            when = datetime.fromtimestamp(line["time"], UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            return json.dumps({"timestamp": when, **line["fields"]})
        if not self._colors:
            return str(line["text"])
        from otel_smtp.telemetry.terminal_log import colored

        return colored(line["text"], line["outcome"])


def _follow(gateway: AskedGateway, parameters: dict[str, str], printing: _Printing) -> None:
    """Print what comes until enough was printed.

    Raises:
        NoAnswer: the first time that it is asked.
    """
    after = ""
    is_lost = False
    while True:
        try:
            answer = gateway.ask(
                "api", "tail", seconds=_ANSWER_SECONDS, **parameters, **({"after": after} if after else {})
            )
            if answer is None:
                raise NoAnswer(f"the gateway at {gateway.url} is of a version that has no tail")
        except NoAnswer as error:
            if not after:
                raise
            if not is_lost:
                printing.say(f"{error}; waiting for it")
            is_lost = True
            time.sleep(_AGAIN_SECONDS)
            continue
        if is_lost:
            is_lost = False
            printing.say("it is back")
        if not after:
            for note in answer["notes"]:
                printing.say(note)
        after = answer["after"]
        if not printing.lines(answer):
            return
