"""What 250 rests on: the order of system calls, a process that is killed, a disk that fails or is full, two owners.

Short versions of what `python -m tests.durability` does at length.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from otel_smtp.spool.embedded.files import has_durable_writes
from tests.durability.failing import fill, inject, may_mount, send, settings_of, starve
from tests.durability.killing import kill_again_and_again
from tests.durability.model import MODES, run_model
from tests.durability.upstream import CountingUpstream
from tests.support.process import ROOT, environment, gateway, settings_file, until
from tests.support.tools import tool


@pytest.mark.parametrize("octets", [1000, 300_000], ids=["in the log", "in a file of its own"])
def test_record_and_file_and_their_names_are_synced_in_this_order_before_250(tmp_path: Path, octets: int) -> None:
    trace = tmp_path / "trace"
    calls = "openat,fdatasync,fsync,rename,sendto,write,sendmsg,pwrite64,pwritev2,close"
    strace = [tool("strace"), "-f", "-qq", "-y", "-s", "60", "-o", str(trace), "-e", f"trace={calls}"]
    spool = tmp_path / "spool"
    with CountingUpstream(0) as upstream:
        upstream.is_closed = True  # the spool alone stands behind this 250
        with gateway(settings_of(spool, upstream.port), tmp_path, under=strace) as running:
            assert send(running.port, "one", octets=octets) == 250
            assert send(running.port, "two", octets=octets) == 250
    lines = trace.read_text(encoding="utf-8", errors="replace").splitlines()
    segment = r"<[^>]*/log/0{11}1>"
    begun = next(number for number, line in enumerate(lines) if re.search(r'rename\("[^"]*/log/spare", ', line))
    assert _done(lines, r"fdatasync\(\d+<[^>]*/log/spare>") < begun, "a segment's head is synced before it has its name"
    named = _done(lines, r"fsync\(\d+<[^>]*/log>", after=begun)
    answered = [number for number, line in enumerate(lines) if '"250 2.0.0 Ok' in line]
    assert len(answered) == 2
    before = named
    for answer in answered:
        if octets > 100_000:
            synced = _done(lines, r"fdatasync\(\d+<[^>]*/tmp/\w+>", after=0 if before == named else before)
            renamed = _done(lines, r'rename\("[^"]*/tmp/\w+", "[^"]*/large/', after=synced)
            directory = _done(lines, r"fsync\(\d+<[^>]*/large>", after=renamed)
            before = max(before, directory)
        if has_durable_writes(tmp_path):
            synced = _done(lines, rf"pwritev2\(\d+{segment}.*RWF_DSYNC", after=before)
        else:
            written = _done(lines, rf"pwrite64\(\d+{segment}", after=before)
            synced = _done(lines, rf"fdatasync\(\d+{segment}", after=written)
        assert before < synced < answer
        before = answer


def _done(lines: list[str], pattern: str, *, after: int = -1) -> int:
    """The line on which the first call that fits, begun behind line `after`, has come back."""
    begun = next(number for number, line in enumerate(lines) if number > after and re.search(pattern, line))
    if "unfinished" not in lines[begun]:
        return begun
    thread, call = lines[begun].split()[0], lines[begun].split()[1].partition("(")[0]
    resumed = f"<... {call} resumed>"
    return next(
        number for number, line in enumerate(lines) if number > begun and line.split()[0] == thread and resumed in line
    )


def test_a_process_that_is_killed_loses_nothing_that_it_answered_250(tmp_path: Path) -> None:
    books = kill_again_and_again(6, tmp_path, seed=7)
    assert len(books.accepted) > 20
    assert (books.lost, books.unmarked_duplicates) == (set(), set())
    assert books.is_balanced, books.told()
    assert books.left == 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("call", "error", "when"),
    # The sync of a large content, or of a group; a segment's name, its directory, its head; groups. In the thread of
    # the index they hit what is not needed.
    [
        ("fdatasync", "EIO", 2),
        ("rename", "EIO", 2),
        ("fsync", "EIO", 2),
        ("pwrite64", "EIO", 2),
        ("pwritev2", "EIO", 3),
        ("pwritev2", "ENOSPC", 3),
    ],
)
def test_a_disk_that_fails_is_never_250(tmp_path: Path, call: str, error: str, when: int) -> None:
    if call == "pwritev2" and not has_durable_writes(tmp_path):
        call, when = "pwrite64", 11
    outcome = inject(call, error, when, tmp_path / "run")
    assert outcome.started
    assert outcome.survived
    assert outcome.lost == set()
    assert not outcome.is_damaged
    if error == "EIO":
        # From the fault on nothing is taken, and the log says why.
        refused = outcome.replies.index(451)
        assert set(outcome.replies[refused:]) == {451}
        assert outcome.log.count("spool failed: intake and delivery stopped until a restart") == 1


def test_a_full_disk_refuses_mail_and_keeps_what_is_queued(tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("this process may not mount a file system of its own")
    full = fill(tmp_path / "full")
    assert full.accepted >= 10
    assert full.refusals == {452}
    assert full.accepted_later == 3
    assert full.lost == set()


@pytest.mark.long
def test_deliveries_go_on_with_no_octet_free(tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("this process may not mount a file system of its own")
    starved = starve(tmp_path / "starved")
    assert (starved.accepted, starved.delivered) == (300, 300), starved.told()
    assert starved.refused == {452}
    assert starved.accepted_later == 1


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_the_books_are_balanced_whatever_happens(tmp_path: Path, mode: str) -> None:
    model = run_model(mode, 150, tmp_path / mode, seed=3)
    assert model.is_right, "\n".join([model.told(), *model.found()])
    assert len(model.accepted) > 20


def test_a_second_gateway_does_not_start_on_the_same_spool(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "spool", 9)
    (tmp_path / "second").mkdir()
    with gateway(settings, tmp_path) as running:
        path = settings_file({**settings, "listener.address": ["127.0.0.1:0"]}, tmp_path / "second")
        told = subprocess.run(
            [sys.executable, "-m", "otel_smtp", "serve", "--config", path],
            capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
            env=environment({}, tmp_path, uses_uvloop=True),
        )  # fmt: skip
        assert told.returncode == 1
        assert f"belongs to another process, pid {running.pid}" in told.stderr
        assert send(running.port, "still here") == 250


def test_mail_of_a_killed_gateway_is_delivered_by_the_next(tmp_path: Path) -> None:
    with CountingUpstream(0) as upstream:
        upstream.is_closed = True
        settings = settings_of(tmp_path / "spool", upstream.port)
        with gateway(settings, tmp_path) as first:
            assert send(first.port, "one") == 250
        upstream.is_closed, upstream.is_willing = False, True
        with gateway(settings, tmp_path):
            until(lambda: upstream.taken["one"] or None, "it is delivered")
