"""Several processes as one gateway: asks the other processes' status ports, and merges the answers.

The process that has the operator's status port asks its siblings, each at its own loopback port, within the time that
a person waits for a page. One that does not answer in time is left out and reported as silent. A sibling requires the
token that all processes received before they were forked.

`Siblings` imports the HTTP client when it is made: a gateway of one process never does.
"""

import asyncio
import contextlib
import json
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any, Final

TOKEN_HEADER: Final = "x-otel-smtp-token"  # noqa: S105 - the name of a header
# All are on one machine: a process that needs longer is stopped or overloaded. Kubernetes gives a probe one second.
ANSWER_SECONDS: Final = 0.5

_SAMPLE: Final = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(\{\}?)?")
_SEVERITIES: Final = ("failed", "refused", "aborted", "ok")
_BREAKERS: Final = ("closed", "half-open", "open")  # from good to bad


class Siblings:
    """The other processes of this gateway.

    Args:
        number: this process's.
        ports: the others' loopback ports, by number.
        token: required by them.
        answer_seconds: a process silent for longer is left out.
    """

    def __init__(
        self, number: int, ports: Mapping[int, int], token: str, *, answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        import httpx

        self.number = number
        self._unanswered = (httpx.HTTPError, TimeoutError)
        self._ports = dict(ports)
        self._answer_seconds = answer_seconds
        self._client = httpx.AsyncClient(
            headers={TOKEN_HEADER: token}, trust_env=False, timeout=answer_seconds, follow_redirects=False
        )

    @property
    def numbers(self) -> Sequence[int]:
        """The others' numbers."""
        return sorted(self._ports)

    async def ask(self, path: str, *, accept: str = "application/json") -> Mapping[int, tuple[int, bytes]]:
        """Ask all; returns status and body of each answer in time, by number."""
        answers = await asyncio.gather(*(self._ask_one(self._ports[number], path, accept) for number in self.numbers))
        return {number: answer for number, answer in zip(self.numbers, answers, strict=True) if answer is not None}

    async def ask_json(self, path: str, *, statuses: Container[int] = (200,)) -> Mapping[int, Any]:
        """As `ask`, for JSON answers with one of `statuses`, as values."""
        found: dict[int, Any] = {}
        for number, (status, body) in (await self.ask(path)).items():
            if status in statuses:
                with contextlib.suppress(ValueError):
                    found[number] = json.loads(body)
        return found

    async def close(self) -> None:
        """Cancel all requests."""
        await self._client.aclose()

    async def _ask_one(self, port: int, path: str, accept: str) -> tuple[int, bytes] | None:
        try:
            async with asyncio.timeout(self._answer_seconds):
                answer = await self._client.get(f"http://127.0.0.1:{port}{path}", headers={"accept": accept})
        except self._unanswered:
            return None
        return answer.status_code, answer.content


def merged_reasons(reasons: Mapping[int, Mapping[str, str]]) -> Mapping[str, str]:
    """Why processes are not ready, with the process's number in the check's name."""
    return {f"{check} (process {number})": why for number in sorted(reasons) for check, why in reasons[number].items()}


def merged_pictures(pictures: Mapping[int, Mapping[str, Any]], *, connections_shown: int) -> dict[str, Any]:
    """The live part of the page, of all processes that answered."""
    numbers = sorted(pictures)
    counters = [pictures[number]["counters"] for number in numbers]
    connections = [{**row, "worker": number} for number in numbers for row in pictures[number]["connections"]]
    connections.sort(key=lambda row: row["opened_unix_milliseconds"])
    return {
        "not_ready": merged_reasons({number: pictures[number]["not_ready"] for number in numbers}),
        "counters": {
            "connections_open": sum(each["connections_open"] for each in counters),
            "connections_accepted": sum(each["connections_accepted"] for each in counters),
            "connections_refused": _sums([each["connections_refused"] for each in counters]),
            "transactions": _sums([each["transactions"] for each in counters]),
        },
        "connections": connections[:connections_shown],
        "upstreams": _merged_upstreams([row for number in numbers for row in pictures[number]["upstreams"]]),
        "traces_version": sum(pictures[number]["traces_version"] for number in numbers),
    }


def _sums(counts: Sequence[Mapping[str, int]]) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _merged_upstreams(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each upstream once: sums of connections and limits, the worst breaker, the latest success and failure."""
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = merged.get(row["name"])
        if known is None:
            merged[row["name"]] = dict(row)
            continue
        for name in ("idle", "busy", "limit", "waiting"):
            known[name] += row[name]
        if _BREAKERS.index(row["breaker"]) > _BREAKERS.index(known["breaker"]):
            known["breaker"], known["retry_seconds"] = row["breaker"], row["retry_seconds"]
        if _is_later(row["last_failure_seconds"], known["last_failure_seconds"]):
            known["last_failure_seconds"], known["last_failure"] = row["last_failure_seconds"], row["last_failure"]
        if _is_later(row["last_success_seconds"], known["last_success_seconds"]):
            known["last_success_seconds"] = row["last_success_seconds"]
    return list(merged.values())


def _is_later(age: float | None, other: float | None) -> bool:
    return age is not None and (other is None or age < other)


def merged_searches(found: Sequence[Mapping[str, Any]], *, is_errors_first: bool, shown: slice) -> dict[str, Any]:
    """The processes' traces in one list. A trace with parts in several processes is listed once."""
    traces: dict[str, dict[str, Any]] = {}
    for summary in (summary for one in found for summary in one["traces"]):
        known = traces.get(summary["trace_id"])
        if known is None:
            traces[summary["trace_id"]] = dict(summary)
            continue
        spans = known["spans"] + summary["spans"]
        end = max(known["end_unix_milliseconds"], summary["end_unix_milliseconds"])
        worse = min(known, summary, key=lambda each: _SEVERITIES.index(each["severity"]))
        traces[summary["trace_id"]] = {**worse, "spans": spans, "end_unix_milliseconds": end}
    ordered = sorted(traces.values(), key=lambda trace: -float(trace["end_unix_milliseconds"]))
    if is_errors_first:
        ordered.sort(key=lambda trace: _SEVERITIES.index(trace["severity"]))
    return {
        "traces": ordered[shown],
        "found": sum(one["found"] for one in found),
        "held": sum(one["held"] for one in found),
        "by_severity": _sums([one["by_severity"] for one in found]),
        "notes": list(dict.fromkeys(note for one in found for note in one["notes"])),
        "complete_since_unix_milliseconds": max(one["complete_since_unix_milliseconds"] for one in found),
    }


def merged_metrics(pages: Mapping[int, bytes]) -> bytes:
    """The metrics pages of all processes as one: each series with the label `worker`, each family once.

    Each counter restarts with its process, as Prometheus expects; a sum would go down.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # by name: head lines, samples
    has_end = False
    for number in sorted(pages):
        heads, samples = families.setdefault("", ([], []))
        for line in pages[number].decode().splitlines():
            if line == "# EOF":
                has_end = True
            elif line.startswith("# incomplete"):
                heads.append(f"{line} (process {number})")
            elif line.startswith("# "):
                heads, samples = families.setdefault(line.split(" ", 3)[2], ([], []))
                if line not in heads:
                    heads.append(line)
            elif line:
                samples.append(_labelled(line, number))
    lines = [line for heads, samples in families.values() for line in (*heads, *samples)]
    return "\n".join([*lines, *(["# EOF"] if has_end else [])]).encode() + b"\n"


def _labelled(sample: str, number: int) -> str:
    found = _SAMPLE.match(sample)
    if found is None:
        return sample
    label, rest = f'worker="{number}"', sample[found.end() :]
    if found[2] == "{":
        return f"{found[1]}{{{label},{rest}"
    return f"{found[1]}{{{label}}}{rest}"
