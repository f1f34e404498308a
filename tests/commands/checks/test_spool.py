"""The spool's directory, looked at and left alone."""

import os
from pathlib import Path

from otel_smtp.commands.checks.spool import check_spool
from otel_smtp.config import Settings, load
from otel_smtp.spool.embedded import EmbeddedStore


def queue(directory: Path, **limits: object) -> Settings:
    return load(
        values={
            "upstream": [{"url": "smtp://127.0.0.1:9"}],
            "delivery": {"mode": "queue"},
            "spool": {"directory": str(directory)},
            "limits": limits,
        }
    )


async def test_a_spool_is_tried_without_being_touched(tmp_path: Path) -> None:
    assert check_spool(load(values={"upstream": [{"url": "smtp://127.0.0.1:9"}]})) is None
    finding = check_spool(queue(tmp_path / "deep" / "spool"))
    assert finding is not None
    assert (finding.verdict, finding.detail.startswith("is usable, ")) == ("ok", True)
    assert list(tmp_path.iterdir()) == []
    store = EmbeddedStore(tmp_path / "spool")
    await store.open()
    owned = check_spool(queue(tmp_path / "spool"))
    await store.close()
    assert owned == ("ok", f"spool {tmp_path}/spool", f"in use by a gateway: pid {os.getpid()}")
    again = check_spool(queue(tmp_path / "spool"))
    assert again is not None
    assert again.detail.startswith("is usable, ")


def test_an_unusable_spool_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = check_spool(queue(tmp_path / "file" / "spool"))
    assert finding == ("failed", f"spool {tmp_path}/file/spool", f"{tmp_path}/file is no directory")
