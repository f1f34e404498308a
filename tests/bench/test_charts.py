"""The charts: what they show, and that the same results give the same files."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.bench.charts import CHARTS, draw
from tests.bench.figures import Results
from tests.bench.made import GOOD, results

pytest.importorskip("matplotlib", reason="Matplotlib is not installed: pip install -e '.[bench]'")


def texts(path: Path) -> list[str]:
    return [" ".join(element.itertext()).strip() for element in ET.parse(path).iter() if element.tag.endswith("text")]


def test_each_headline_is_a_picture(tmp_path: Path) -> None:
    assert draw(results(), tmp_path) == list(CHARTS)
    shown = texts(tmp_path / "mails-per-second.svg")
    for name, (_, rate) in GOOD.items():
        assert any(text.startswith(name) for text in shown)
        assert f"{rate:,.0f}" in shown
    assert any("Median of 5 interleaved rounds" in text and "2026-01-02" in text for text in shown)


def test_the_same_results_give_the_same_pictures(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        draw(results(), tmp_path / name)
    for chart in CHARTS:
        assert (tmp_path / "one" / chart).read_bytes() == (tmp_path / "two" / chart).read_bytes()


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    assert draw(Results(), tmp_path) == []
