"""`otel-smtp queue` as a process: with a gateway that owns the spool, and without one."""

import errno
import json
import os
import re
import smtplib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from otel_smtp.smtp.replies import Reply
from otel_smtp.spool.embedded import to_be_moved
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.messages import SpoolError
from tests.commands.test_cli import Result, run
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript
from tests.support.process import GatewayProcess, gateway, until

MAIL = b"Subject: a queued one\r\n\r\nHello.\r\n"


def queue(spool: Path, *arguments: str, stdin: str = "") -> Result:
    return run("queue", *arguments, "--spool", str(spool), stdin=stdin, COLUMNS="120")


def rows(spool: Path) -> list[dict[str, Any]]:
    told = queue(spool, "list", "--json")
    assert told.returncode == 0, told.stderr
    return [json.loads(line) for line in told.stdout.splitlines()]


@pytest.fixture
def running(tmp_path: Path, upstream: CapturingUpstream) -> Iterator[GatewayProcess]:
    """A gateway in mode queue, whose upstream says 451 to everything, with three messages in its spool."""
    upstream.say(UpstreamScript(mail=(Reply(451, None, ("4.7.1 later",)),) * 100))
    settings = {
        "upstream.url": upstream.url,
        "delivery.mode": "queue",
        "spool.directory": str(tmp_path / "spool"),
        "spool.retry": ["1h"],
    }
    with gateway(settings, tmp_path) as process:
        with smtplib.SMTP("127.0.0.1", process.port) as client:
            for number in range(3):
                client.sendmail("app@example.com", [f"user{number}@example.net"], MAIL)
        until(
            lambda: all(row["queue_name"] == "deferred" for row in rows(tmp_path / "spool")) or None,
            "all three were attempted",
        )
        yield process


@pytest.fixture
def upstream() -> Iterator[CapturingUpstream]:
    with CapturingUpstream() as upstream:
        yield upstream


def test_with_a_gateway_and_after_it(running: GatewayProcess, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    ids = [row["queue_id"] for row in rows(spool)]
    assert len(ids) == 3
    listed = queue(spool, "list").stdout
    assert all(one in listed for one in ids)
    assert "3 messages" in listed
    assert listed.count("451 4.7.1 later") == 3  # why they wait, and each message in one line for who searches
    assert len(listed.splitlines()) == 6
    shape = queue(spool, "shape", "--by", "reason").stdout
    assert ["451", "4.7.1", "later", "3", "3"] in [line.split() for line in shape.splitlines()]
    assert queue(spool, "hold", ids[0]).stdout == "1 held\n"
    assert f"{ids[0]}!" in queue(spool, "list").stdout
    assert queue(spool, "delete", "-", "--as", "ann", stdin=f"{ids[1]}\n").stdout == "1 removed\n"
    assert "451 4.7.1 later" in queue(spool, "show", ids[0]).stdout
    changes = [line for line in running.log if line.get("event") == "queued message changed by an operator"]
    assert [(line["command"], line["spool_id"]) for line in changes] == [("hold", ids[0]), ("delete", ids[1])]
    assert changes[0]["operator"] not in ("", "ann", "unnamed")  # whose login this is
    assert changes[1]["operator"] == "ann"
    [removed] = [line for line in running.log if line.get("smtp.spool.action") == "removed"]
    assert (removed["smtp.spool.operator"], removed["trace_id"]) == ("ann", changes[1]["trace_id"])
    assert running.stop() == 0
    # The same, now that nobody runs.
    assert [row["queue_id"] for row in rows(spool)] == [ids[0], ids[2]]
    assert queue(spool, "release", "--all").stdout == "1 released\n"
    counted = json.loads(queue(spool, "counts").stdout)
    assert counted["recipients"] == {"accepted": 3, "delivered": 0, "failed": 0, "expired": 0, "removed": 1}


def test_the_settings_stand_in_front_of_the_command_and_behind_it(running: GatewayProcess, tmp_path: Path) -> None:
    file = tmp_path / "queue.toml"
    file.write_text(f'[[upstream]]\nurl = "smtp://127.0.0.1:1"\n[spool]\ndirectory = "{tmp_path / "spool"}"\n')
    given = ("--config", str(file))
    for arguments in (
        (*given, "queue", "list"),
        ("queue", *given, "list"),
        ("queue", "list", *given),
        ("queue", "list", "-c", str(file)),
        (
            "queue",
            "list",
            "--set",
            f"spool.directory={tmp_path / 'spool'}",
            "--set",
            "upstream.0.url=smtp://127.0.0.1:1",
        ),
    ):
        told = run(*arguments, COLUMNS="120")
        assert "3 messages" in told.stdout, (arguments, told.stderr)


def test_filters_choose_messages(running: GatewayProcess, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    assert "3 messages" in queue(spool, "list", "--domain", "example.net", "--reason", "later").stdout
    assert queue(spool, "list", "--older-than", "1h").stdout == "no message in the queue fits\n"
    assert queue(spool, "find", "--trace", "0" * 32).stdout == "no message in the queue fits\n"
    assert queue(spool, "hold", "--all", "--sender", "@example.org").stdout == "0 held\n"
    assert queue(spool, "hold", "--all", "--sender", "@example.com").stdout == "3 held\n"
    told = [json.loads(line) for line in queue(spool, "shape", "--json", "--domain", "example.net").stdout.splitlines()]
    assert [(row["domain"], row["messages"], row["ages"]["5m"]) for row in told] == [("example.net", 3, 3)]


def test_times_have_their_zone(running: GatewayProcess, tmp_path: Path) -> None:
    (first, *_) = rows(tmp_path / "spool")
    told = queue(tmp_path / "spool", "show", first["queue_id"]).stdout
    assert re.search(r"arrived +[0-9-]{10} [0-9:]{8} [+-][0-9]{4}, ", told)


def test_an_export_has_the_message_and_its_envelope(running: GatewayProcess, tmp_path: Path) -> None:
    told = queue(tmp_path / "spool", "export", "--all", "--to", str(tmp_path / "out"))
    assert told.returncode == 0
    files = sorted((tmp_path / "out").glob("*.eml"))
    assert len(files) == 3
    assert all(file.read_bytes().endswith(MAIL) for file in files)
    envelope = json.loads(files[0].with_suffix(".json").read_text())
    assert envelope["sender"] == "app@example.com"
    shown = queue(tmp_path / "spool", "show", files[0].stem, "--content").stdout
    assert shown.endswith(MAIL.decode().replace("\r\n", "\n"))
    # What cannot be exported does not keep the others from it.
    told = queue(tmp_path / "spool", "export", "nothing", files[1].stem, "--to", str(tmp_path / "other"))
    assert (told.returncode, told.stdout) == (1, f"{tmp_path / 'other' / files[1].name}\n")
    assert "queue export: no message nothing" in told.stderr
    assert [file.name for file in (tmp_path / "other").glob("*.eml")] == [files[1].name]
    told = queue(tmp_path / "spool", "export", "--all", "--to", str(files[0]))
    assert (told.returncode, told.stderr) == (1, f"otel-smtp: queue: {files[0]}: File exists\n")
    assert files[0].read_bytes().endswith(MAIL)


def test_an_export_keeps_what_was_exported_before(running: GatewayProcess, tmp_path: Path) -> None:
    """Of a message that is queued no longer, that may be the last copy; and no other file is removed for an id."""
    spool, out = tmp_path / "spool", tmp_path / "out"
    first = rows(spool)[0]["queue_id"]
    assert queue(spool, "export", first, "--to", str(out)).returncode == 0
    assert queue(spool, "delete", first).returncode == 0
    (tmp_path / "mine.eml").write_text("not ours")
    told = queue(spool, "export", first, "../mine", "--to", str(out))
    assert (told.returncode, told.stdout) == (1, "")
    assert (out / f"{first}.eml").read_bytes().endswith(MAIL)
    assert (tmp_path / "mine.eml").read_text() == "not ours"


def test_a_queued_message_has_its_trace_id(running: GatewayProcess, tmp_path: Path) -> None:
    traces = {line["smtp.spool.id"]: line["trace_id"] for line in running.log if line["event"] == "smtp.transaction"}
    assert {row["queue_id"]: row["trace_id"] for row in rows(tmp_path / "spool")} == traces
    (trace_id,) = set(traces.values())  # they came over one connection
    assert all(spool_id in queue(tmp_path / "spool", "find", "--trace", trace_id).stdout for spool_id in traces)
    assert "1 message, " in queue(tmp_path / "spool", "find", "--recipient", "user1@example.net").stdout
    every = queue(tmp_path / "spool", "find", "--sender", "app@example.com", "--json").stdout
    assert {json.loads(line)["queue_id"] for line in every.splitlines()} == set(traces)


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("hold",), 2, "no messages named"),
        (("find",), 2, "give --trace, --sender or --recipient"),
        (("delete", "--all"), 2, "deletes every queued message; add --yes to confirm"),
        (("delete", "--all", "--domain", "x"), 2, "deletes each that fits; add --yes to confirm"),
        (("delete", "an-id", "--all", "--yes"), 2, "queue delete: give ids, or --all, not both"),
        (("hold", "--all", "-"), 2, "queue hold: give ids, or --all, not both"),
        (("export", "an-id", "--all"), 2, "queue export: give ids, or --all, not both"),
        (("hold", "--domain", "x"), 2, "choose among --all"),
        (("list", "--older-than", "soon"), 2, '--older-than = "soon": allowed: seconds'),
        (("show", "nothing"), 1, "no message nothing"),
        (("shape", "--by", "colour"), 2, "is not one of 'domain', 'sender', 'reason'"),
        (("hold", "nothing"), 1, "no message nothing"),
    ],
)
def test_wrong_use_is_explained(
    running: GatewayProcess, tmp_path: Path, arguments: tuple[str, ...], status: int, told: str
) -> None:
    result = queue(tmp_path / "spool", *arguments)
    assert result.returncode == status
    assert told in result.stderr
    assert len(rows(tmp_path / "spool")) == 3


def test_an_export_into_a_directory_that_cannot_be_made(running: GatewayProcess, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = queue(tmp_path / "spool", "export", "--all", "--to", str(tmp_path / "file" / "below"))
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == f"otel-smtp: queue: {tmp_path / 'file' / 'below'}: Not a directory\n"


def test_a_spool_that_is_out_of_reach_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for another user, below a directory that only its owner enters: root, as which tests may run, enters all."""

    def out_of_reach(path: Path, **_: bool) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", out_of_reach)
    with pytest.raises(SpoolError, match=r"^/spool: Permission denied$"):
        to_be_moved(Path("/spool"))
    with pytest.raises(SpoolError, match=r"^/spool: Permission denied$"):
        SpoolDirectory(Path("/spool")).try_out()


def test_no_spool_is_an_error(tmp_path: Path) -> None:
    told = queue(tmp_path / "nowhere", "list")
    assert told.returncode == 1
    assert "there is no spool" in told.stderr
