"""Settings that change nothing beside the others: warnings, and none where each has an effect."""

from pathlib import Path
from typing import Any

import pytest

from otel_smtp.config import load


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that settings name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("cert", "key", "users"):
        (tmp_path / name).touch()
    (tmp_path / "secret").write_text("a secret of thirty-two octets, here")


ALL: dict[str, Any] = {"name": "all", "url": "smtp://127.0.0.1:1025"}
NET: dict[str, Any] = {"name": "net", "url": "smtp://127.0.0.1:1026", "recipients": ["*@example.net"]}
SENT: dict[str, Any] = {"name": "sent", "url": "smtp://127.0.0.1:1027", "senders": ["*@example.org"]}
BOTH = NET | {"senders": ["*@example.org"]}
AUTH = {"auth": "required", "auth_users_file": "users"}
IMPLICIT = {"tls": "implicit", "tls_cert": "cert", "tls_key": "key"}
UNIX = {"address": ["unix:gw"]}
EVERYBODY = {"allow": ["0.0.0.0/0"]}
QUEUE: dict[str, Any] = {"delivery": {"mode": "queue"}, "spool": {"directory": "s"}}
LOGGED: dict[str, Any] = QUEUE | {"spool": {"directory": "s", "bounce": "log"}}
APP: dict[str, Any] = {"url": "https://app.example/events", "key_file": "secret"}


def warnings_of(values: dict[str, Any]) -> tuple[str, ...]:
    return load(values={"upstream": [ALL]} | values, file_limit=100_000).warnings


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"listener": [{"auth_in_clear": True}]}, "listener.0.auth_in_clear has no effect with listener.0.auth = off"),
        (
            {"listener": [AUTH | IMPLICIT | {"auth_in_clear": True}]},
            "listener.0.auth_in_clear has no effect with listener.0.tls = implicit",
        ),
        ({"listener": [{"open_relay": True}]}, "listener.0.open_relay has no effect: listener.0 is no open relay"),
        (
            {"listener": [AUTH | IMPLICIT | EVERYBODY | {"open_relay": True}]},
            "listener.0.open_relay has no effect: listener.0 is no open relay",
        ),
        (
            {"listener": [UNIX | {"allow": []}]},
            "listener.0.allow has no effect on unix sockets: all who can open them may relay",
        ),
        (
            {"listener": [UNIX | {"proxy_protocol_from": ["10.0.0.1"]}]},
            "listener.0.proxy_protocol_from has no effect on unix sockets",
        ),
        (
            {"upstream": [ALL, NET]},
            "upstream.1.recipients: upstream.0, which is for all mail, is asked first; "
            "move it behind upstream.1 to prefer this one",
        ),
        (
            {"upstream": [SENT, ALL, BOTH]},
            "upstream.2.senders and upstream.2.recipients: upstream.1, which is for all mail, is asked first; "
            "move it behind upstream.2 to prefer this one",
        ),
        (
            {"spool": {"directory": "s"}},
            "spool.directory has no effect with delivery.mode = direct, which has no queue",
        ),
        (
            {"spool": {"url_file": "secret", "retry": ["1m"]}},
            "spool.url_file, spool.retry have no effect with delivery.mode = direct, which has no queue",
        ),
        (
            QUEUE | {"delivery": {"mode": "queue", "strategy": "buffered"}},
            "delivery.strategy has no effect with delivery.mode = queue: no client waits for the upstream",
        ),
        (
            QUEUE | {"spool": {"directory": "s", "bounce": "off", "warn_after": "1h"}},
            "spool.warn_after has no effect with spool.bounce = off",
        ),
        (
            LOGGED | {"notify": [APP | {"events": ["bounced", "expired"]}]},
            "notify.0.events lists bounced, but with spool.bounce = log such recipients are reported as refused",
        ),
        (
            {"telemetry": {"addresses_hash_key_file": "secret"}},
            "telemetry.addresses_hash_key has no effect with telemetry.addresses = domain",
        ),
        (
            {"telemetry": {"slow": "1s", "keep": ["errors"]}},
            "telemetry.slow has no effect unless telemetry.keep lists slow",
        ),
        ({"telemetry": {"keep_rate": "1/s"}}, "telemetry.keep_rate has no effect without telemetry.keep"),
        (
            {"status": {"address": "off", "hosts": ["gw.example"], "token_file": "secret"}},
            "status.hosts, status.token_file have no effect with status.address = off",
        ),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_worth_a_word(values: dict[str, Any], expected: str) -> None:
    if "url_file" in values.get("spool", {}):
        Path("secret").write_text("postgresql://relay@db.example/mail")
    elif "token_file" in values.get("status", {}):
        Path("secret").write_text("a-token-of-many-characters")
    assert warnings_of(values) == (expected,)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"listener": [AUTH | {"auth_in_clear": True}]},
        {"listener": [EVERYBODY | {"open_relay": True}]},
        {"listener": [UNIX]},
        {"listener": [UNIX | AUTH | {"auth_in_clear": True, "allow": []}]},
        {"listener": [{"address": ["unix:gw", "127.0.0.1:0"], "allow": [], "proxy_protocol_from": ["10.0.0.1"]}]},
        {"upstream": [NET, SENT, BOTH | {"name": "both"}, ALL, ALL | {"name": "spare", "url": "smtp://127.0.0.1:1"}]},
        QUEUE | {"spool": {"directory": "s", "retry": ["1m"], "warn_after": "1h"}},
        LOGGED | {"spool": {"directory": "s", "bounce": "log", "warn_after": "off"}, "notify": [APP]},
        {"delivery": {"mode": "direct-then-queue", "strategy": "buffered"}, "spool": {"directory": "s"}},
        {"telemetry": {"addresses": "hash", "addresses_hash_key_file": "secret"}},
        {"telemetry": {"slow": "1s", "keep": ["slow"], "keep_rate": "1/s"}},
        {"status": {"address": "off"}},
        {"status": {"address": "127.0.0.1:0", "hosts": ["gw.example"]}},
    ],
)
def test_settings_that_have_an_effect_need_no_word(values: dict[str, Any]) -> None:
    assert warnings_of(values) == ()
