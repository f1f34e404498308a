"""The results of a search: selection, order and pages of traces, over all processes of the gateway.

The list changes while it is read. A page is therefore requested as of a time (`until`): traces that end later do not
move others to the next page.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlencode

from otel_smtp.status.search import RecordedMailbox, parse
from otel_smtp.status.siblings import Siblings, merged_searches
from otel_smtp.status.traces import RecentTraces, Severity, SpanOctets

TRACES_SHOWN: Final = 100
# Before a page. A process sends the first one all traces before the page as well, within half a second.
MOST_SKIPPED: Final = 4900
# Per turn of the loop: making a summary takes up to 0.1 ms.
_TRACES_A_TURN: Final = 32
_SPANS_A_TURN: Final = 2000  # half a millisecond
_ERRORS: Final = frozenset({Severity.FAILED, Severity.REFUSED})


class SearchRequest(NamedTuple):
    """A request for a page of results.

    Attributes:
        query: see `search`.
        has_errors_only: only traces in which something was refused or failed.
        is_errors_first: failures, then refusals, then what clients gave up, then the others; else the newest first, by
            their last span.
        skip: traces before the page.
        most: traces on it.
        until: traces whose last span ended later are left out; milliseconds since the epoch.
    """

    query: str = ""
    has_errors_only: bool = False
    is_errors_first: bool = False
    skip: int = 0
    most: int = TRACES_SHOWN
    until: float = math.inf

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Self:
        """From a URL's parameters: `q`, `only=errors`, `order=errors`, `skip`, `until`; nonsense counts as absent."""
        return cls(
            parameters.get("q", ""),
            parameters.get("only") == "errors",
            parameters.get("order") == "errors",
            int(_number(parameters.get("skip", ""), 0, MOST_SKIPPED)),
            int(_number(parameters.get("most", ""), TRACES_SHOWN, MOST_SKIPPED + TRACES_SHOWN)),
            _number(parameters.get("until", ""), math.inf, math.inf),
        )

    def of_sibling(self) -> str:
        """The request to another process, as the parameters of a URL: includes the pages before this one."""
        return urlencode(
            {
                "q": self.query,
                **({"only": "errors"} if self.has_errors_only else {}),
                **({"order": "errors"} if self.is_errors_first else {}),
                "most": self.skip + self.most,
                **({"until": self.until} if self.until < math.inf else {}),
            }
        )


def _number(text: str, default: float, most: float) -> float:
    try:
        number = float(text)
    except ValueError:
        return default
    return min(number, most) if number >= 0 else default


class TraceSearch:
    """Searches the recent traces.

    Args:
        traces: of this process.
        recorded: the form of a searched address in spans.
        siblings: the gateway's other processes, to search too.
        untraced: which mails have no trace, and so cannot be found, in words; "" if all have one.
    """

    def __init__(
        self,
        traces: RecentTraces,
        recorded: RecordedMailbox,
        siblings: Siblings | None = None,
        *,
        untraced: str = "",
    ) -> None:
        self._traces = traces
        self._recorded = recorded
        self._siblings = siblings
        self._untraced = untraced

    async def answer(self, asked: SearchRequest) -> dict[str, Any]:
        """A page of the list, with how many there are.

        Yields to the event loop repeatedly.
        """
        found = await self._own(asked)
        answers = [found]
        if self._siblings is not None:
            theirs = await self._siblings.ask_json(f"/api/traces?{asked.of_sibling()}")
            answers += theirs.values()
            for silent in [number for number in self._siblings.numbers if number not in theirs]:
                found["notes"].append(f"process {silent} did not answer: the traces of its mails are missing")
        return merged_searches(
            answers, is_errors_first=asked.is_errors_first, shown=slice(asked.skip, asked.skip + asked.most)
        )

    async def _own(self, asked: SearchRequest) -> dict[str, Any]:
        query = parse(asked.query, self._recorded)
        held = await self._held_traces()
        counts: dict[str, int] = dict.fromkeys(Severity, 0)
        summaries: list[Mapping[str, Any]] = []
        unreadable = 0
        for looked_at, (trace_id, spans) in enumerate(held.items()):
            if looked_at % _TRACES_A_TURN == _TRACES_A_TURN - 1:
                await asyncio.sleep(0)
            try:
                trace = self._traces.trace(trace_id, spans)
                summary = trace.summary()
                is_found = trace.matches(query) and summary["end_unix_milliseconds"] <= asked.until
            except Exception:  # noqa: BLE001 - logged once; the others are found
                self._traces.faults.note("trace")
                unreadable += 1
                continue
            if not is_found:
                continue
            severity = summary["severity"]
            counts[severity] += 1
            if severity in _ERRORS or not asked.has_errors_only:
                summaries.append(summary)
        notes = [*query.notes, *([self._untraced] if self._untraced else [])]
        if unreadable:
            notes.append(f"{unreadable} of the traces in memory cannot be read: the log says why")
        return {
            "traces": summaries,
            "found": len(summaries),
            "held": len(held),
            "by_severity": counts,
            "notes": notes,
            "complete_since_unix_milliseconds": self._traces.complete_since_ns() / 1e6,
        }

    async def _held_traces(self) -> Mapping[bytes, Sequence[SpanOctets]]:
        """The spans in memory by trace, newest first."""
        held: dict[bytes, list[SpanOctets]] = {}
        spans = self._traces.spans()
        for start in range(0, len(spans), _SPANS_A_TURN):
            self._traces.group(spans[start : start + _SPANS_A_TURN], held)
            await asyncio.sleep(0)
        self._traces.forget_all_but(held)
        return held
