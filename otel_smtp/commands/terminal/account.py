"""The fate of a mail in plain words: for whom, why, by whose reply, and what took so long.

An account is made from finished spans. Missing spans (of another process, or no longer in memory) leave out only their
own facts.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NamedTuple

from rich.text import Text

from otel_smtp.commands.terminal.listing import age, is_aging
from otel_smtp.commands.terminal.otlp_spans import OtlpEvent, OtlpSpan
from otel_smtp.commands.terminal.words import counted, duration, outcome_style, plain
from otel_smtp.telemetry import attributes as names

# Attempts shown per mail; of more, the first and the last.
_ATTEMPTS_TOLD: Final = 6
# Shorter waits are not mentioned.
_SHORT_NS: Final = 1_000_000
_PHASES: Final[Mapping[str, str]] = {
    "pool": "a free connection to {upstream}",
    "connect": "the connection to {upstream}",
    "greeting": "{upstream}'s greeting",
    "ehlo": "{upstream}'s answer to EHLO",
    "starttls": "the TLS handshake with {upstream}",
    "auth": "{upstream}'s answer to AUTH",
    "mail": "{upstream}'s answer to MAIL",
    "rcpt": "{upstream}'s answer to RCPT",
    "data": "{upstream}'s answer to DATA",
    "content": "the content, from the client and to {upstream}",
    "reply": "{upstream}'s reply to the content",
    "paced": "the rate limit {limit}",
}


class Saying(NamedTuple):
    """Who said what about whom.

    Attributes:
        whom: a recipient, or several; "" for the whole mail.
        fate: in a word, or a few.
        who: "this gateway", or the upstream's name; "" if neither said it.
        words: the reply, or why there was none.
    """

    whom: str
    fate: str
    who: str
    words: str


@dataclass(frozen=True, slots=True)
class Account:
    """The fate of one mail.

    Attributes:
        spans: of the mail itself: its transaction, if it is known, and the attempts.
        trace: the spans to draw: all of the trace, or this mail's if the trace has several.
        began_ns, ended_ns: the start of its transaction, and the end of its last span.
        outcome: of the transaction; "" if unknown.
        took_long: what took most of the time, and how long; "" if nothing did.
        ids: by their names.
    """

    spans: Sequence[OtlpSpan]
    trace: Sequence[OtlpSpan]
    trace_id: str
    began_ns: int
    ended_ns: int
    kind: str
    sender: str
    recipients: Sequence[str]
    outcome: str
    sayings: Sequence[Saying]
    took_long: str
    ids: Mapping[str, str] = field(default_factory=dict)

    def holds(self, text: str) -> bool:
        """Whether `text`, in lower case, is anywhere in the mail's spans."""
        return any(text in value for value in self._values())

    def as_json(self) -> dict[str, Any]:
        """The account for machines; times are seconds since the epoch, durations seconds."""
        return {
            "trace_id": self.trace_id,
            "time": self.began_ns / 1e9,
            "duration": (self.ended_ns - self.began_ns) / 1e9,
            "kind": self.kind,
            "sender": self.sender,
            "recipients": list(self.recipients),
            "outcome": self.outcome,
            "fates": [
                {"recipient": one.whom, "fate": one.fate, "who": one.who, "words": one.words} for one in self.sayings
            ],
            "took_long": self.took_long,
            "gateways": list(self.gateways),
            **self.ids,
        }

    @property
    def gateways(self) -> Sequence[str]:
        """Known names of the gateways that had it (`service.instance.id`), in order."""
        return list(dict.fromkeys(span.instance for span in self.spans if span.instance))

    def _values(self) -> Iterator[str]:
        for span in self.spans:
            for attributes in (span.attributes, *(event.attributes for event in span.events)):
                for value in attributes.values():
                    for each in value if isinstance(value, tuple) else (value,):
                        yield str(each).lower()


def accounts(spans: Sequence[OtlpSpan]) -> list[Account]:
    """The mails of a trace, in order of their start; of a connection without any, why that is.

    Args:
        spans: of one trace, in order of their start; at least one.
    """
    by_id = {span.context.span_id: span for span in spans}
    below: dict[int, list[OtlpSpan]] = {}  # attempts, and operators' actions on the queued mail
    for span in spans:
        above = _above(span)
        if span.name not in (names.SPAN_CONNECTION, names.SPAN_TRANSACTION) and above:
            below.setdefault(above[0], []).append(span)
    told = [
        _account(span, below.pop(span.context.span_id, []), _connection_of(span, by_id), spans)
        for span in spans
        if span.name == names.SPAN_TRANSACTION
    ]
    # Attempts from the spool whose transaction has left memory.
    told += [_account(None, attempts, None, spans) for attempts in below.values()]
    if not told:
        told = [_account(None, [], span, spans) for span in spans if span.name == names.SPAN_CONNECTION]
    return sorted(told, key=lambda account: account.began_ns)


def _above(span: OtlpSpan) -> list[int]:
    """The spans to which a span belongs: its parent, and its links."""
    return [of.span_id for of in (span.parent, *(link.context for link in span.links)) if of is not None]


def _connection_of(transaction: OtlpSpan, by_id: Mapping[int, OtlpSpan]) -> OtlpSpan | None:
    above = (by_id.get(one) for one in _above(transaction))
    return next((span for span in above if span is not None and span.name == names.SPAN_CONNECTION), None)


def _account(
    transaction: OtlpSpan | None, below: Sequence[OtlpSpan], connection: OtlpSpan | None, trace: Sequence[OtlpSpan]
) -> Account:
    # Those of a bounce, which stands with the mail that it reports on, are none at the mail itself.
    attempts = [
        span for span in below if span.name == names.SPAN_DELIVERY and (transaction is None or not _of_notice(span))
    ]
    is_alone = sum(span.name == names.SPAN_TRANSACTION for span in trace) <= 1
    of_mail = [*([transaction] if transaction else []), *below] or [span for span in [connection] if span]
    about = transaction.attributes if transaction else {}
    ids = {
        name: str(value)
        for name, key in (("queue_id", names.SPOOL_ID), ("message_id", names.MESSAGE_ID))
        if (value := _first(of_mail, key)) is not None
    }
    return Account(
        spans=of_mail,
        trace=trace if is_alone else of_mail,
        trace_id=f"{of_mail[0].context.trace_id:032x}",
        began_ns=of_mail[0].start_ns,
        ended_ns=max(span.end_ns for span in of_mail),
        kind=str(_first(attempts, names.MESSAGE_KIND) or "mail"),
        sender=_sender(about) if transaction else "",
        recipients=_recipients(about),
        outcome=str(about.get(names.OUTCOME, "")) if transaction else "",
        sayings=list(_sayings(transaction, below, attempts, connection)),
        took_long=_longest(transaction, attempts),
        ids=ids,
    )


def _sayings(
    transaction: OtlpSpan | None, below: Sequence[OtlpSpan], attempts: Sequence[OtlpSpan], connection: OtlpSpan | None
) -> Iterator[Saying]:
    notices = [span for span in below if _of_notice(span)] if transaction is not None else []
    spans = [*([transaction] if transaction else []), *(span for span in below if span not in notices)]
    told_events = [event for span in spans for event in span.events if event.name == names.RECIPIENT_EVENT]
    yield from _of_recipients(spans)
    # A refused recipient is an Error event too; its own event says more.
    rcpt_told = {event.attributes.get(names.REPLY_CODE) for event in told_events}
    errors = [
        event
        for event in _errors(transaction, connection)
        if not (event.attributes.get(names.VERB) == "RCPT" and event.attributes.get(names.REPLY_CODE) in rcpt_told)
    ]
    chosen = attempts
    if len(attempts) > _ATTEMPTS_TOLD:
        chosen = [*attempts[: _ATTEMPTS_TOLD // 2], *attempts[-_ATTEMPTS_TOLD // 2 :]]
    is_shared = len({span.instance for span in spans}) > 1
    of_attempts = [_of_attempt(attempt, transaction, is_shared=is_shared) for attempt in chosen]
    unanswered = [span.attributes for span in attempts if names.REPLY_CODE not in span.attributes]
    explained = {about.get(names.ERROR_TYPE) for about in unanswered if names.FAILURE_REASON in about}
    for event in errors:
        if event.attributes.get(names.ERROR_TYPE) in explained:
            continue  # our own words for an attempt without a reply, which say why
        said = _of_error(event, attempts, connection)
        # The client was given an upstream's reply: it is shown once, in the upstream's full words.
        same = next((one for one in of_attempts if f"{one.words} ".startswith(f"{said.words} ")), None)
        if same is not None:
            of_attempts.remove(same)
            said = said._replace(words=same.words, who=same.who)
        yield said
    yield from of_attempts
    for notice in notices:
        yield from _of_notices_end(notice)
    if transaction is not None and not attempts and not errors and not told_events:
        words = _reply(transaction.attributes) or plain(transaction.attributes.get(names.FAILURE_REASON, ""))
        yield Saying("", _became(transaction.attributes), "this gateway", words or _end_of(connection))


def _of_notice(span: OtlpSpan) -> str:
    """Which of our own messages it is about, a bounce for one; "" for none."""
    kind = plain(span.attributes.get(names.MESSAGE_KIND, "mail"))
    return "" if kind == "mail" else kind.replace("_", " ")


def _of_notices_end(span: OtlpSpan) -> Iterator[Saying]:
    """The fate of a notice about the mail: an attempt at it, or its end in the queue."""
    whom = f"the {_of_notice(span)}"
    if span.name == names.SPAN_DELIVERY:
        yield _of_attempt(span, None, is_shared=False)._replace(whom=whom)
    else:
        for event in span.events:
            if event.name == names.RECIPIENT_EVENT:
                yield _of_recipient(event, span)._replace(whom=whom)


def _end_of(connection: OtlpSpan | None) -> str:
    """How the connection ended, if that ended the mail too."""
    reason = "" if connection is None else str(connection.attributes.get(names.CLOSE_REASON, "quit"))
    return "" if reason in ("", "quit") else plain(reason).replace("_", " ")


def _of_recipients(spans: Sequence[OtlpSpan]) -> Iterator[Saying]:
    """The fates of single recipients; of one deferred repeatedly, only the last."""
    sayings = [
        (number, _of_recipient(event, span))
        for number, span in enumerate(spans)
        for event in span.events
        if event.name == names.RECIPIENT_EVENT
    ]
    last = {said[:3]: number for number, said in sayings}
    for number, said in sayings:
        if "deferred" not in said.fate or last[said[:3]] == number:
            yield said


def _of_recipient(event: OtlpEvent, span: OtlpSpan) -> Saying:
    a = event.attributes
    if (more := a.get(names.RECIPIENTS_NOT_SHOWN)) is not None:
        return Saying(f"{more} more recipients", "refused or deferred", "", "")
    whom = a.get(names.RCPT_ADDRESS) or a.get(names.RCPT_DOMAIN) or "a recipient"
    operator = span.attributes.get(names.SPOOL_OPERATOR)
    who = _who(a) if operator is None else plain(operator)
    return Saying(plain(whom), plain(a.get(names.RECIPIENT_FATE, "refused")), who, _reply(a))


def _errors(transaction: OtlpSpan | None, connection: OtlpSpan | None) -> Iterator[OtlpEvent]:
    """The error replies to a client while the transaction was open; without a transaction, all of them."""
    if connection is None:
        return
    number = transaction.attributes.get(names.TRANSACTION_NUMBER) if transaction else None
    for event in connection.events:
        if event.attributes.get(names.STATE) != "Error":
            continue
        its_number = event.attributes.get(names.TRANSACTION_NUMBER)
        if transaction is None:
            yield event
        elif its_number is not None and number is not None:
            if its_number == number:
                yield event
        elif transaction.start_ns <= event.time_ns <= transaction.end_ns + _SHORT_NS:
            yield event


def _of_error(event: OtlpEvent, attempts: Sequence[OtlpSpan], connection: OtlpSpan | None) -> Saying:
    a = event.attributes
    verb = str(a.get(names.VERB, ""))
    is_upstreams = str(a.get(names.ERROR_TYPE, "")).startswith("upstream")
    who = "this gateway"
    if is_upstreams:
        who = next((str(span.attributes[names.UPSTREAM_NAME]) for span in attempts), "the upstream")
    code = a.get(names.REPLY_CODE)
    fate = "failed" if code is None else "refused" if int(code) >= 500 else "deferred"
    whom = {"RCPT": "a recipient", "MAIL": "the sender"}.get(verb, "" if verb in ("", ".", "DATA", "BDAT") else verb)
    # Without a reply, the connection has the reason.
    reason = None if connection is None else connection.attributes.get(names.FAILURE_REASON)
    return Saying(whom, fate, plain(who), _reply(a) or plain(reason or a.get(names.ERROR_TYPE, "")))


def _of_attempt(attempt: OtlpSpan, transaction: OtlpSpan | None, *, is_shared: bool) -> Saying:
    a = attempt.attributes
    accepted = a.get(names.DELIVERY_ACCEPTED)
    if accepted is None and transaction is not None:
        accepted = transaction.attributes.get(names.RECIPIENT_COUNT)
    whom = "" if accepted is None else f"{accepted} recipient{'' if accepted == 1 else 's'}"
    number = int(a.get(names.DELIVERY_ATTEMPT, 1))
    fate = _became(a)
    if number > 1:
        fate = f"{fate} at attempt {number}"
    words = _reply(a)
    reason = a.get(names.FAILURE_REASON) or ("" if words else a.get(names.ERROR_TYPE, ""))
    words = "; ".join(part for part in (words, plain(reason), *_whose(attempt, is_shared=is_shared)) if part)
    if fate == "aborted" and not words:
        words = "the client gave up"
    return Saying(whom if fate.startswith("accepted") else "", fate, _who(a), words)


def _whose(attempt: OtlpSpan, *, is_shared: bool) -> Iterator[str]:
    """Which of several gateways attempted it, and from which one it took the mail over."""
    if is_shared and attempt.instance:
        yield f"by gateway {plain(attempt.instance)}"
    for event in attempt.events:
        if event.name == names.TAKEN_OVER_EVENT:
            who, silent = (
                event.attributes.get(names.TAKEN_OVER_FROM),
                event.attributes.get(names.TAKEN_OVER_SILENT, 0.0),
            )
            yield f"taken over from {plain(who)}, which was silent for {float(silent):.1f} s"
    if attempt.attributes.get(names.POSSIBLE_DUPLICATE):
        yield "perhaps a second time"


def _became(attributes: Mapping[str, Any]) -> str:
    outcome = plain(attributes.get(names.OUTCOME, "not known"))
    return {"relayed": "accepted", "partly_relayed": "accepted", "unknown": "perhaps accepted"}.get(outcome, outcome)


def _who(attributes: Mapping[str, Any]) -> str:
    name = attributes.get(names.UPSTREAM_NAME)
    if name is None:
        return "this gateway"
    host, port = attributes.get(names.SERVER_ADDRESS), attributes.get(names.SERVER_PORT)
    where = "" if host is None else f"{plain(host)}{'' if port is None else f':{port}'}"
    return plain(name) if where in ("", plain(name)) else f"{plain(name)} ({where})"


def _reply(attributes: Mapping[str, Any]) -> str:
    parts = (attributes.get(name) for name in (names.REPLY_CODE, names.REPLY_ENHANCED_CODE, names.REPLY_TEXT))
    return " ".join(plain(part) for part in parts if part not in (None, ""))


def _first(spans: Iterable[OtlpSpan], name: str) -> Any:
    return next((span.attributes[name] for span in spans if name in span.attributes), None)


def _sender(attributes: Mapping[str, Any]) -> str:
    known = attributes.get(names.MAIL_FROM_ADDRESS, attributes.get(names.MAIL_FROM_DOMAIN))
    return "a sender not recorded" if known is None else plain(known) or "<>"


def _recipients(attributes: Mapping[str, Any]) -> Sequence[str]:
    return [plain(one) for one in attributes.get(names.RCPT_ADDRESSES) or attributes.get(names.RCPT_DOMAINS) or ()]


def _longest(transaction: OtlpSpan | None, attempts: Sequence[OtlpSpan]) -> str:
    """The longest wait of all, if it is long enough to be mentioned."""
    waits: list[tuple[int, str]] = []
    for attempt in attempts:
        upstream = plain(attempt.attributes.get(names.UPSTREAM_NAME, "the upstream"))
        before = attempt.start_ns
        for event in attempt.events:
            phase = _PHASES.get(event.name.removeprefix("smtp.upstream."))
            if phase is not None:
                limit = plain(event.attributes.get(names.LIMIT_NAME, "of the settings"))
                waits.append((event.time_ns - before, phase.format(upstream=upstream, limit=limit)))
                before = event.time_ns
        if attempt.attributes.get(names.OUTCOME, "aborted") == "aborted":
            last = "the client, which gave up"
        elif names.FAILURE_REASON in attempt.attributes:
            last = f"{upstream}'s answer, which did not come"
        else:
            last = f"the client, after {upstream}'s last answer"
        waits.append((attempt.end_ns - before, last))
    for one, after in pairwise(attempts):
        waits.append((after.start_ns - one.end_ns, f"the wait until attempt {_attempt(after)}"))
    if transaction is not None and attempts:
        waits.append((attempts[0].start_ns - transaction.start_ns, "what came before the first attempt"))
        if attempts[-1].end_ns < transaction.end_ns:
            is_queued = transaction.attributes.get(names.OUTCOME) == "queued"
            what = "making it durable, after the attempt" if is_queued else "what came after the last attempt"
            waits.append((transaction.end_ns - attempts[-1].end_ns, what))
    if not waits:
        return ""
    longest, what = max(waits)
    return f"{what} ({duration(longest)})" if longest >= _SHORT_NS else ""


def _attempt(span: OtlpSpan) -> int:
    return int(span.attributes.get(names.DELIVERY_ATTEMPT, 1))


# As lines -----------------------------------------------------------------------------------------------------


def account_lines(account: Account) -> list[Text]:
    """The account in lines: the summary, then one line for each reply."""
    when = time.strftime("%d %b %H:%M:%S", time.localtime(account.began_ns / 1e9))
    to = ", ".join(account.recipients[:3]) or "recipients not recorded"
    if len(account.recipients) > 3:
        to += f" (+{len(account.recipients) - 3})"
    head = Text.assemble((f"{when}  ", "dim"))
    if account.outcome:
        head.append(f"{account.sender} -> {to}", "bold")
        head.append("  ").append(account.outcome.replace("_", " "), outcome_style(account.outcome))
    elif any(span.name == names.SPAN_DELIVERY for span in account.spans):
        kind = account.kind.replace("_", " ")
        head.append(f"a {kind} from the queue" if kind != "mail" else "a mail from the queue", "bold")
    else:
        head.append("a connection without mail", "bold")
    head.append(f"  {duration(account.ended_ns - account.began_ns)}", "dim")
    lines = [head, *(_saying_line(one) for one in account.sayings)]
    if account.took_long:
        lines.append(Text(f"  Longest: {account.took_long}", "dim"))
    ids = "".join(f"  {name.replace('_', ' ')} {plain(value)}" for name, value in account.ids.items())
    lines.append(Text(f"  trace {account.trace_id}{ids}", "dim"))
    return lines


def _saying_line(said: Saying) -> Text:
    style = "green" if said.fate.startswith("accepted") else outcome_style(said.fate.split(" ")[0]) or "yellow"
    line = Text("  ")
    if said.whom:
        line.append(f"{said.whom}: ")
    line.append(said.fate.replace("_", " "), style)
    by = f" by {said.who}" if said.who and said.fate.split(" ")[0] not in ("aborted", "queued") else ""
    return line.append(f"{by}{': ' if said.words else ''}{said.words}")


def queued_lines(row: Mapping[str, Any], now: float) -> list[Text]:
    """A message's state in the queue, in lines.

    Args:
        row: as `spool.operators` answers.
        now: seconds since the epoch.
    """
    state = plain(row["queue_name"])
    words = [f"{counted(row['attempts'], 'attempt')} in {age(now - row['arrival_time'])}"]
    if state == "hold":
        words.append("held: an operator has to release it")
    elif state == "corrupt":
        words.append("its content is damaged: an operator has to act")
    elif state == "active":
        words.append("being delivered now" + (f" by gateway {plain(row['gateway'])}" if row.get("gateway") else ""))
    elif row["next_attempt"] > now:
        words.append(f"next attempt in {age(row['next_attempt'] - now)}")
    if row["expires"] is not None and is_aging(row):
        words.append(f"given up in {age(max(0.0, row['expires'] - now))}")
    head = Text.assemble("  in the queue as ", (plain(row["queue_id"]), "cyan"), f": {', '.join(words)}")
    lines = [head]
    for one in row["recipients"]:
        state = "waits" if one["state"] == "ready" else one["state"]
        parts = (one["address"], state, one.get("delay_reason"))
        lines.append(Text(f"    {': '.join(plain(part) for part in parts if part)}"))
    return lines
