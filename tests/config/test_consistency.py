"""Settings that are each readable and cannot hold together; the open relay above all."""

from pathlib import Path
from typing import Any

import pytest

from otel_smtp.config import Settings, SettingsError, load


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that settings name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("cert", "key", "users", "ca"):
        (tmp_path / name).touch()


LOCAL: dict[str, Any] = {"url": "smtp://127.0.0.1:1025"}
TLS = {"tls": "starttls", "tls_cert": "cert", "tls_key": "key"}
AUTH = {"auth": "required", "auth_users_file": "users"}
EVERYWHERE = {"address": ["0.0.0.0:2525"]}


def load_with(listener: dict[str, Any] | None = None, /, **values: Any) -> Settings:
    values.setdefault("upstream", [LOCAL])
    return load(values=values | ({"listener": [listener]} if listener else {}))


def refusal_of(listener: dict[str, Any] | None = None, /, **values: Any) -> str:
    with pytest.raises(SettingsError) as refusal:
        load_with(listener, **values)
    return str(refusal.value)


# Open relay --------------------------------------------------------------------------------------------------

ANY_RELAYS = "other machines can reach it, so say who may relay"


@pytest.mark.parametrize(
    "listener",
    [
        EVERYWHERE,
        {"address": ["[::]:2525"]},
        {"address": ["10.0.0.1:2525"]},
        {"address": ["gw.example.com:2525"]},
        {"address": ["127.0.0.1:2525", "0.0.0.0:2526"]},
        EVERYWHERE | TLS,
        EVERYWHERE | AUTH | {"auth_in_clear": True},
        EVERYWHERE | TLS | AUTH | {"auth_in_clear": True},
    ],
)
def test_an_exposed_listener_needs_to_say_who_may_relay(listener: dict[str, Any]) -> None:
    assert ANY_RELAYS in refusal_of(listener)


@pytest.mark.parametrize(
    "listener",
    [
        {"address": ["127.0.0.1:2525", "[::1]:2525", "localhost:2526"]},
        {"address": ["unix:/run/gw.sock"]},
        EVERYWHERE | {"allow": ["10.0.0.0/8"]},
        EVERYWHERE | {"allow": []},
        EVERYWHERE | TLS | AUTH,
        EVERYWHERE | TLS | AUTH | {"auth": "optional"},
    ],
)
def test_an_exposed_listener_that_says_who_may_relay_is_accepted(listener: dict[str, Any]) -> None:
    assert load_with(listener).warnings == ()


STRANGERS = [
    ["0.0.0.0/0"],
    ["::/0"],
    ["0.0.0.0/1", "128.0.0.0/1"],
    ["10.0.0.0/8", "192.0.0.0/2"],
    ["::/1", "8000::/1"],
    ["2000::/3"],
    ["2000::/4"],
    [f"{first}.0.0.0/8" for first in range(100, 164)],
]


@pytest.mark.parametrize("allow", STRANGERS)
def test_relaying_for_everybody_is_refused_without_consent(allow: list[str]) -> None:
    told = refusal_of(EVERYWHERE | {"allow": allow})
    assert "lets any client that reaches 0.0.0.0:2525 relay to anybody: an open relay; name the networks" in told
    assert "open relay" in refusal_of(EVERYWHERE | TLS | AUTH | {"auth": "optional", "allow": allow})


@pytest.mark.parametrize("allow", STRANGERS)
def test_relaying_for_everybody_with_consent_is_worth_a_word(allow: list[str]) -> None:
    (warning,) = load_with(EVERYWHERE | {"allow": allow, "open_relay": True}).warnings
    assert warning == "settings: listener.0.allow lets any client that reaches 0.0.0.0:2525 relay to anybody"


@pytest.mark.parametrize(
    "listener",
    [
        EVERYWHERE | {"allow": ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"]},
        EVERYWHERE | {"allow": ["8000::/1"]},  # nothing there was given out
        EVERYWHERE | TLS | AUTH | {"allow": ["0.0.0.0/0"]},
        {"address": ["127.0.0.1:2525"], "allow": ["0.0.0.0/0"]},
    ],
)
def test_relaying_for_many_is_no_open_relay(listener: dict[str, Any]) -> None:
    assert load_with(listener).warnings == ()


@pytest.mark.parametrize("anyone", STRANGERS)
@pytest.mark.parametrize("allow", [["127.0.0.0/8", "::1/128"], ["10.0.0.0/8"]])
def test_a_stranger_must_not_choose_an_address_that_may_relay(anyone: list[str], allow: list[str]) -> None:
    refusal = refusal_of(EVERYWHERE | {"proxy_protocol_from": anyone, "allow": allow})
    assert "any client could name itself an address of listener.0.allow and relay" in refusal
    assert anyone[0] in refusal


@pytest.mark.parametrize(
    "listener",
    [
        EVERYWHERE | {"proxy_protocol_from": ["10.0.0.0/24"], "allow": ["127.0.0.0/8", "192.0.2.0/24"]},
        EVERYWHERE | TLS | AUTH | {"proxy_protocol_from": ["0.0.0.0/0"], "allow": []},
        EVERYWHERE | TLS | AUTH | {"proxy_protocol_from": ["0.0.0.0/0"], "auth": "required"},
        {"address": ["127.0.0.1:2525"], "proxy_protocol_from": ["0.0.0.0/0"]},  # only this machine reaches it
    ],
)
def test_headers_of_listed_balancers_and_where_no_address_relays_are_believed(listener: dict[str, Any]) -> None:
    assert load_with(listener).warnings == ()


def test_passwords_in_clear_on_a_network_are_worth_a_word() -> None:
    (warning,) = load_with(EVERYWHERE | AUTH | {"auth_in_clear": True, "allow": []}).warnings
    assert warning == "listener.0.auth_in_clear: clients send passwords in clear to 0.0.0.0:2525"


# Everything else ----------------------------------------------------------------------------------------------

SECURE = {"url": "smtps://m.example", "username": "u", "password": "p"}


@pytest.mark.parametrize(
    ("listener", "expected"),
    [
        ({"tls": "starttls"}, "listener.0.tls = \"starttls\": needs listener.0.tls_cert\n"),
        ({"tls": "implicit", "tls_cert": "cert"}, 'listener.0.tls = "implicit": needs listener.0.tls_key'),
        ({"tls_cert": "cert", "tls_key": "key"}, 'listener.0.tls_cert = "cert": has no effect with tls = off'),
        ({"tls_required": True}, "listener.0.tls_required = true: contradicts listener.0.tls = off"),
        ({"auth": "optional"} | TLS, 'listener.0.auth = "optional": needs listener.0.auth_users_file'),
        (AUTH, 'listener.0.auth = "required": needs TLS'),
        (AUTH | {"auth": "off"}, 'listener.0.auth_users_file = "users": has no effect with auth = off; set listener.0'),
        ({"protocol": "lmtp", "address": ["127.0.0.1:25"]}, "LMTP must not use port 25"),
        ({"address": ["127.0.0.1:2525", "127.0.0.1:2525"]}, "is also an address of listener.0"),
        ({"address": ["127.0.0.1:9925"]}, 'status.address = "127.0.0.1:9925": is also an address of listener.0'),
    ],
)  # fmt: skip
def test_contradictions_of_a_listener_are_refused(listener: dict[str, Any], expected: str) -> None:
    assert expected in refusal_of(listener) + "\n"


def test_auth_in_clear_on_loopback_is_taken() -> None:
    assert load_with(AUTH | {"auth_in_clear": True}).listener[0].auth == "required"


def test_only_a_program_that_verifies_tokens_needs_no_users_file() -> None:
    listener = TLS | {"auth": "required"}
    assert "needs listener.0.auth_users_file" in refusal_of(listener)
    settings = load(values={"upstream": [LOCAL], "listener": [listener]}, verifies_tokens=True)
    assert settings.listener[0].auth_users_file is None


def test_two_listeners_of_one_name_are_refused() -> None:
    listeners = [{"address": ["127.0.0.1:0"]}, {"address": ["127.0.0.1:0"]}]
    assert 'settings: listener.1.name = "local": is also the name of listener.0' in refusal_of(listener=listeners)


@pytest.mark.parametrize(
    ("upstream", "expected"),
    [
        (SECURE | {"url": "smtp://m.example"}, "upstream.0.username = \"u\": would be sent in clear to smtp://m.example:25"),
        ({"url": "smtps://m.example", "username": "u"}, "needs upstream.0.password_file or upstream.0.password"),
        ({"url": "smtps://m.example", "password": "p"}, 'upstream.0.password = "***": needs upstream.0.username'),
        ({"url": "smtps://m.example", "auth": "plain"}, 'upstream.0.auth = "plain": needs upstream.0.username'),
        (SECURE | {"auth": "off"}, 'upstream.0.auth = "off": contradicts upstream.0.username'),
        (LOCAL | {"ca_file": "ca"}, 'upstream.0.ca_file = "ca": has no effect with smtp://127.0.0.1:1025'),
        (LOCAL | {"server_name": "m.example"}, 'upstream.0.server_name = "m.example": has no effect'),
        (LOCAL | {"scope": "mail"}, 'upstream.0.scope = "mail": needs upstream.0.token_url'),
        (LOCAL | {"client_id": "id"}, 'upstream.0.client_id = "***": needs upstream.0.token_url'),
    ],
)  # fmt: skip
def test_contradictions_of_an_upstream_are_refused(upstream: dict[str, Any], expected: str) -> None:
    assert expected in refusal_of(upstream=[upstream])


@pytest.mark.parametrize("url", ["smtp://127.0.0.1:1025", "smtp://[::1]:1025", "lmtp:///run/lmtp", "smtp+starttls://h"])
def test_credentials_go_over_loopback_or_verified_tls(url: str) -> None:
    assert load_with(upstream=[SECURE | {"url": url}]).upstream[0].username == "u"


@pytest.mark.parametrize("broken", [{"delivery": {"mode": "fast"}}, {"spool": {"retry": []}}])
def test_nothing_is_concluded_from_an_invalid_table(broken: dict[str, Any]) -> None:
    values: dict[str, Any] = {"upstream": [LOCAL], "workers": 2, "spool": {"max_age": "1h", "warn_after": "2h"}}
    with pytest.raises(SettingsError) as caught:
        load(values={**values, **{key: values.get(key, {}) | table for key, table in broken.items()}})
    assert [problem.key for problem in caught.value.problems] == [
        f"{key}.{name}" for key in broken for name in broken[key]
    ]
    with pytest.raises(SettingsError, match=r"spool\.warn_after"):
        load(values=values)


def test_two_upstreams_of_one_name_are_refused() -> None:
    upstreams = [{"url": "smtp://a.example", "name": "a"}, {"url": "smtp://b.example", "name": "a"}]
    assert 'upstream.1.name = "a": is also the name of upstream.0' in refusal_of(upstream=upstreams)
    assert 'upstream.1.name = "127.0.0.1:1025": is also' in refusal_of(upstream=[LOCAL, LOCAL])


@pytest.mark.parametrize(
    ("address", "url", "is_loop"),
    [
        ("127.0.0.1:2525", "smtp://127.0.0.1:2525", True),
        ("127.0.0.1:2525", "smtp://localhost:2525", True),
        ("localhost:2525", "smtp://[::1]:2525", True),
        ("127.0.0.1:2525", "smtp://127.0.0.1:2526", False),
        ("127.0.0.1:2525", "smtp://[::1]:2525", False),  # a server on the other family is another server
        ("0.0.0.0:2525", "smtp://127.0.0.1:2525", True),
        ("[::]:2525", "smtp://localhost:2525", True),
        ("127.0.0.1:2525", "smtp://0.0.0.0:2525", True),  # a connection to it reaches this machine
        ("[::1]:2525", "smtp://[::]:2525", True),
        ("0.0.0.0:2525", "smtp://0.0.0.0:2525", True),
        ("127.0.0.1:2525", "smtp://[::ffff:127.0.0.1]:2525", True),
        ("127.0.0.1:2525", "smtp://[::ffff:127.0.0.1]:2526", False),
        ("10.0.0.1:2525", "smtp://0.0.0.0:2525", False),
        ("[::1]:2525", "smtp://[0:0::1]:2525", True),
        ("0.0.0.0:25", "smtp://gw.example.com", True),
        ("0.0.0.0:25", "smtp://m.example.com", False),
        ("10.0.0.1:25", "smtp://10.0.0.1", True),
        ("unix:/run/gw", "lmtp:///run/gw", True),
        ("unix:/run/gw", "lmtp:///run/other", False),
    ],
)
def test_an_upstream_that_is_our_own_listener_is_refused(address: str, url: str, is_loop: bool) -> None:
    values: dict[str, Any] = {
        "hostname": "gw.example.com",
        "listener": [{"address": [address], "allow": ["10.0.0.0/8"]}],
        "upstream": [{"url": url}],
    }
    if is_loop:
        assert "mail would loop" in refusal_of(**values)
    else:
        load_with(**values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"delivery": {"mode": "queue"}}, 'delivery.mode = "queue": needs spool.directory'),
        ({"delivery": {"mode": "direct-then-queue"}}, "needs spool.directory"),
        ({"spool": {"url": "postgresql://h/d", "directory": "s"}}, 'spool.url = "***": contradicts spool.directory'),
        ({"spool": {"takeover_after": "5s"}}, "spool.takeover_after = 5.0: has no effect without spool.url"),
        ({"spool": {"schema": "mail"}}, 'spool.schema = "mail": has no effect without spool.url'),
        (
            {"delivery": {"mode": "queue"}, "spool": {"directory": "s"}, "workers": 2},
            "one process owns spool.directory",
        ),
        ({"spool": {"warn_after": "5d"}}, 'spool.warn_after = "5d": must be before spool.max_age, or "off"'),
        ({"telemetry": {"addresses": "hash"}}, 'telemetry.addresses = "hash": needs telemetry.addresses_hash_key_file'),
    ],
)
def test_other_contradictions_are_refused(values: dict[str, Any], expected: str) -> None:
    assert expected in refusal_of(**values)


def test_several_processes_share_a_queue_in_a_database() -> None:
    spool = {"url": "postgresql://h/d", "schema": "mail", "takeover_after": "5s"}
    settings = load_with(delivery={"mode": "queue"}, spool=spool, workers=2)
    assert (settings.spool.schema, settings.spool.takeover_after) == ("mail", 5.0)


TOKENS = {
    "url": "smtps://m.example",
    "username": "relay@example.com",
    "token_url": "https://login.example/token",
    "client_id": "id",
    "client_secret": "secret",
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"auth": "xoauth2"}, None),
        ({"client_secret": None, "refresh_token": "r"}, None),
        ({"username": None}, "needs upstream.0.username"),
        ({"client_id": None}, "upstream.0.client_id"),
        ({"client_secret": None}, "needs upstream.0.client_secret or upstream.0.refresh_token"),
        ({"password": "p"}, "contradicts upstream.0.token_url"),
        ({"auth": "plain"}, 'upstream.0.auth = "plain": contradicts upstream.0.token_url'),
        ({"token_url": None, "password": "p"}, "needs upstream.0.token_url"),
        ({"token_url": "http://login.example/token"}, "an https URL"),  # a secret would go in clear
        ({"token_url": "https://me:hunter2@login.example/"}, 'upstream.0.token_url = "***": allowed: an https URL'),
        ({"tls_cert": __file__}, "needs upstream.0.tls_key"),
        ({"tls_key": __file__}, f'settings: upstream.0.tls_key = "{__file__}": needs upstream.0.tls_cert'),
        ({"tls_cert": __file__, "tls_key": __file__}, None),
    ],
)
def test_tokens_and_client_certificates_are_whole_or_refused(change: dict[str, Any], expected: str | None) -> None:
    upstream = {key: value for key, value in {**TOKENS, **change}.items() if value is not None}
    if expected is None:
        load_with(upstream=[upstream])
    else:
        refusal = refusal_of(upstream=[upstream])
        assert expected in refusal
        assert '"secret"' not in refusal


def test_consequences_of_an_invalid_value_are_not_reported() -> None:
    refusal = refusal_of({"address": ["0.0.0.0"], "tls": "starttls"})
    assert refusal.count("\n") == 0
    assert "listener.0.address" in refusal


# Limits ------------------------------------------------------------------------------------------------------

RATE: dict[str, Any] = {"name": "provider-rate", "rate": "30/m"}


def test_a_limit_holds_for_the_upstreams_that_name_it() -> None:
    settings = load_with(limit=[RATE | {"burst": 30}], upstream=[LOCAL | {"limits": ["provider-rate"]}])
    assert settings.limit[0].rate == (30, 60.0)
    assert settings.warnings == ()
    assert load_with(limit=[RATE]).warnings == ("limit.0: no upstream names it",)


@pytest.mark.parametrize(
    ("limit", "limits", "expected"),
    [
        (
            [RATE],
            ["provider-rate", "provider-rate"],
            "upstream.0.limits = ['provider-rate', 'provider-rate']: names provider-rate twice",
        ),
        ([RATE], ["other"], "upstream.0.limits = ['other']: no [[limit]] is called other: provider-rate"),
        ([], ["other"], "no [[limit]] is called other: there is no [[limit]]"),
        ([RATE | {"burst": 31}], [], "limit.0.burst = 31: is more than limit.0.rate lets leave: 30"),
        ([RATE, RATE], [], "limit.1.name = 'provider-rate': is also the name of limit.0"),
        ([{"rate": "30/m"}], [], "limit.0.name: is missing"),
        ([{"name": "x"}], [], "limit.0.rate: is missing"),
        ([RATE | {"rate": "0/m"}], [], "allowed: a whole number, at least 1, per second"),
        ([RATE | {"per": "octets"}], [], "allowed: messages, recipients"),
    ],
)
def test_limits_that_cannot_hold(limit: list[Any], limits: list[str], expected: str) -> None:
    values = {"limit": limit} if limit else {}
    assert expected in refusal_of(upstream=[LOCAL | {"limits": limits}], **values).replace('"', "'")


def test_connections_that_are_shared_out_bound_those_of_a_process() -> None:
    shared = {"connections_total": 3}
    assert load_with(upstream=[LOCAL | shared]).warnings == ()  # the default contradicts nothing
    settings = load_with(upstream=[LOCAL | shared | {"connections": 4, "messages_per_connection": 101}])
    assert settings.warnings == (
        "upstream.0.connections = 4 is lowered to 3: upstream.0.connections_total lets all together have no more",
        "upstream.0.messages_per_connection = 101 is lowered to 100: "
        "upstream.0.connections_total lets others have a turn",
    )
    less = {"connections": 2, "messages_per_connection": 7}
    assert load_with(upstream=[LOCAL | shared | less]).warnings == ()


@pytest.mark.parametrize("total", [0, -1, 10_001, "3 or so", True])
def test_connections_in_all_that_are_no_number(total: object) -> None:
    refusal = refusal_of(upstream=[LOCAL | {"connections_total": total}])
    assert "upstream.0.connections_total" in refusal
    assert 'allowed: a whole number from 1 to 10000, or "off"' in refusal


# Receivers of outcomes ---------------------------------------------------------------------------------------

APP: dict[str, Any] = {"url": "https://app.example/mail-events", "key": "a key of thirty-two octets, here"}
QUEUE: dict[str, Any] = {"delivery": {"mode": "queue"}, "spool": {"directory": "spool"}}


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://app.example/mail-events?tenant=7", "app.example:443"),
        ("https://app.example:8443", "app.example:8443"),
        ("http://127.0.0.1:9000/events", "127.0.0.1:9000"),
        ("http://localhost/", "localhost:80"),
        ("http://[::1]:9000/", "[::1]:9000"),
    ],
)
def test_a_receiver_is_named_by_its_host(url: str, name: str) -> None:
    (receiver,) = load_with(notify=[APP | {"url": url}], **QUEUE).notify
    assert (receiver.url, receiver.name) == (url, name)


@pytest.mark.parametrize("mode", ["queue", "direct-then-queue"])
def test_a_receiver_in_a_mode_with_a_queue(mode: str, tmp_path: Path) -> None:
    (tmp_path / "hmac").write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    app = {"name": "shop", "url": APP["url"], "key_file": "hmac", "events": ["bounced", "expired"]}
    settings = load_with(notify=[app], **QUEUE | {"delivery": {"mode": mode}})
    assert settings.notify[0].events == ("bounced", "expired")
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"url": "http://app.example/"}, "other machines could read and change what is sent in clear"),
        ({"url": "http://127.0.0.1.evil.example/"}, "other machines could read"),
        ({"url": "https://user:too short@app.example/"}, "notify.0.url = '***': allowed: an https URL"),
        ({"url": "ftp://app.example/"}, "an https URL"),
        ({"url": "https://app.example/#part"}, "an https URL"),
        ({"url": "https://app.example:0/"}, "an https URL"),
        ({"url": "https:///events"}, "an https URL"),
        ({"key": "too short"}, "at least 24 other characters"),
        ({"key": "whsec_dG9vIHNob3J0"}, "base64 of at least 24 octets"),
        ({"key": None}, "settings: notify.0.key_file: is missing"),
        ({"key": None, "key_file": "nowhere"}, "no such file"),
        ({"key": None, "key_file": "key"}, "the file's content is invalid"),
        (
            {"events": ["delivered", "opened"]},
            "each delivered, bounced, refused, expired",
        ),
        ({"events": []}, "at least one"),
        ({"url": None}, "notify.0.url: is missing"),
        ({"ca_file": "nowhere"}, "no such file"),
        (
            {"url": "http://127.0.0.1:9000/", "ca_file": "ca"},
            "ca_file = 'ca': has no effect with an http URL; use https",
        ),
    ],
)
def test_a_receiver_that_cannot_be_told(changes: dict[str, Any], expected: str) -> None:
    app = {name: value for name, value in (APP | changes).items() if value is not None}
    refusal = refusal_of(notify=[app], **QUEUE)
    assert expected in refusal.replace('"', "'")
    assert "too short" not in refusal
    assert refusal.count("\n") == 0


def test_receivers_have_different_names() -> None:
    assert "notify.1.name = 'app.example:443': is also the name of notify.0" in refusal_of(
        notify=[APP, APP], **QUEUE
    ).replace('"', "'")
    assert len(load_with(notify=[APP, APP | {"name": "other"}], **QUEUE).notify) == 2


def test_without_a_queue_the_replies_tell_the_client_everything() -> None:
    assert "notify.0.url" in (refusal := refusal_of(notify=[APP]))
    assert "needs delivery.mode = queue or direct-then-queue" in refusal


# Notices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounce", ["log", "off"])
def test_a_sender_of_notices_needs_notices(bounce: str) -> None:
    spool = {"notice_sender": "bounces@example.com"}
    assert load_with(spool=spool).spool.notice_sender == "bounces@example.com"
    assert f"has no effect with spool.bounce = {bounce}" in refusal_of(spool=spool | {"bounce": bounce})
