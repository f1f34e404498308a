"""A target that finds nothing proves nothing: each notices a fault that is put into the product, by its seeds alone."""

import pytest

from otel_smtp.config import loading
from otel_smtp.server.proxy_protocol import ProxyHeaderParser
from otel_smtp.smtp import content, sasl
from otel_smtp.smtp.client import ClientProtocol
from otel_smtp.smtp.framing import DotReader
from tests.fuzz import headers
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS


def finds_something(target: str) -> bool:
    for seed in seeds(target):
        try:
            TARGETS[target](seed)
        except AssertionError:
            return True
    return False


def test_bare_line_ends_in_content_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(DotReader):
        def feed(self, data: bytes) -> bytes:
            return super().feed(data).replace(b"\r\n", b"\n")

    monkeypatch.setattr(content, "DotReader", Bare)
    assert finds_something("server")


def test_what_depends_on_cuts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(DotReader):
        def feed(self, data: bytes) -> bytes:
            return super().feed(data) if len(data) > 1 else super().feed(data).lower()

    monkeypatch.setattr(content, "DotReader", Forgetful)
    assert finds_something("server")


def test_a_changed_octet_of_the_content_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    send = ClientProtocol.send_content
    monkeypatch.setattr(ClientProtocol, "send_content", lambda self, chunk: send(self, chunk.replace(b"H", b"J")))
    assert finds_something("client")


def test_a_header_that_takes_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProxyHeaderParser, "octets_wanted", 200)
    assert finds_something("proxy")


def test_a_message_that_does_not_come_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sasl, "build_plain", lambda name, password: b"\0somebody\0else")
    assert finds_something("sasl")


def test_an_unprintable_problem_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "unknown_key", lambda word, known: "two\nlines")
    assert finds_something("settings")


def test_a_control_character_that_is_shown_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "clean", lambda text, limit=256: text[:limit])
    assert finds_something("headers")
