"""Every input that was kept, each fault that was found among them, and every seed, through the targets; no fuzzer is
needed for that."""

from pathlib import Path

import pytest

from tests.fuzz.seeds import seeds
from tests.fuzz.targets import CORPUS, TARGETS

MAX_FILES = 300
MAX_OCTETS = 4096


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_hold(target: str) -> None:
    tried = 0
    for seed in seeds(target):
        TARGETS[target](seed)
        tried += 1
    assert tried


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_kept_inputs_hold(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


def test_the_corpus_is_small_and_names_no_unknown_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
    files = list(CORPUS.glob("*/*"))
    assert len(files) < MAX_FILES
    assert all(path.stat().st_size < MAX_OCTETS for path in files)
