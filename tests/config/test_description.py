"""The effective settings and the documented ones."""

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from otel_smtp.config import Row, SettingsError, describe, json_schema, load, settings_table
from otel_smtp.config.settings import SCHEMA, Settings, Table

# The normative names, one line a table.
NAMES = """
hostname workers
listener[]: name address protocol tls tls_cert tls_key tls_required auth auth_users_file auth_in_clear allow
listener[]: open_relay proxy_protocol_from trace_context default_domain received
limits: message_size recipients connections connections_per_client stress messages_per_connection errors refusals
limits: junk_commands command_line auth_line text_line header_size header_lines hops auth_failures
limits: auth_failures_per_minute octets_per_second
timeouts: command command_under_stress data session tls_handshake shutdown_grace
delivery: mode strategy content_newlines
upstream[]: name url username password password_file auth token_url client_id client_secret client_secret_file
upstream[]: refresh_token refresh_token_file scope ca_file tls_cert tls_key server_name connections
upstream[]: connections_total recipients_per_transaction messages_per_connection connection_age connection_idle disable
upstream[]: reencode_8bit limits reply_line reply_lines senders recipients trace_context
upstream[].timeout: connect greeting command data block reply
limit[]: name rate burst per
notify[]: name url key key_file events ca_file connections timeout most_pending
rewrite: sender
spool: directory url url_file schema takeover_after retry max_age warn_after bounce notice_sender
spool: most_messages most_octets
telemetry: addresses addresses_hash_key addresses_hash_key_file client_ip state_events segment_events segment_age
telemetry: trace_in_reply keep slow keep_rate probes message_id
status: address allow hosts trace_url token token_file
log: format level
"""


def names() -> list[str]:
    found = []
    for line in NAMES.strip().splitlines():
        table, _, keys = line.rpartition(": ")
        found += [f"{table}.{key}" if table else key for key in keys.split()]
    return found


def test_the_table_holds_exactly_the_settings_names() -> None:
    rows = settings_table().splitlines()
    assert rows[0] == "| key | default | holds after | meaning |"
    assert [row.split("`")[1] for row in rows[2:]] == names()
    assert all(row.count(" | ") == 3 and row.startswith("| ") and row.endswith(" |") for row in rows[2:])


def test_every_structure_is_in_the_schema() -> None:
    def below(table: type[Table]) -> set[type[Table]]:
        return {table}.union(*(below(child) for child in table.__subclasses__()))

    assert below(Table) - {Table} == set(SCHEMA)
    assert Settings in SCHEMA


def test_the_table_has_the_default_and_its_source() -> None:
    assert (
        "| `limits.recipients` | `1000` | reload | recipients of one transaction "
        "(RFC 5321 4.5.3.1.8 asks for 100; Postfix takes 1000) |" in settings_table()
    )
    assert "| `listener[].tls` | `off` | reload | `off`, `starttls`, `implicit`: " in settings_table()


def test_every_value_is_described_with_its_origin_and_without_secrets() -> None:
    environ = {
        "OTELSMTP_UPSTREAM": "smtps://m.example",
        "OTELSMTP_UPSTREAM__0__USERNAME": "relay",
        "OTELSMTP_UPSTREAM__0__PASSWORD": "hunter2",
        "OTELSMTP_LISTEN": "unix:/run/gw,127.0.0.1:0",
    }
    values = {
        "limit": [{"name": "provider-rate", "rate": "30/m"}],
        "notify": [{"url": "https://app.example/events", "key": "a key of thirty-two octets, here"}],
        "delivery": {"mode": "queue"},
        "spool": {"directory": "spool"},
    }
    rows = describe(load(environ=environ, values=values))
    assert [row.key.replace(".0.", "[].") for row in rows] == names()
    by_key = {row.key: row for row in rows}
    assert by_key["upstream.0.password"] == Row(
        "upstream.0.password", "***", "environment OTELSMTP_UPSTREAM__0__PASSWORD"
    )
    assert by_key["upstream.0.url"].value == "smtps://m.example:465"
    assert (by_key["notify.0.key"].value, by_key["notify.0.name"].value) == ("***", "app.example:443")
    assert by_key["listener.0.address"] == Row(
        "listener.0.address", "unix:/run/gw, 127.0.0.1:0", "environment OTELSMTP_LISTEN"
    )
    assert by_key["listener.0.allow"] == Row("listener.0.allow", "127.0.0.0/8, ::1/128", "default")
    assert by_key["timeouts.session"].value == "off"
    assert by_key["spool.url_file"].value == ""
    assert "hunter2" not in repr(rows)


# JSON Schema -----------------------------------------------------------------------------------------------------


def is_valid(document: dict[str, Any]) -> bool:
    return bool(Draft202012Validator(json_schema()).is_valid(document))


def loads(document: dict[str, Any]) -> bool:
    try:
        load(values={"upstream": [{"url": "smtp://127.0.0.1:1025"}], **document})
    except SettingsError:
        return False
    return True


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize(
    ("document", "judge"),
    [
        ({"hostname": "gw.example.com"}, None),
        ({"hostname": "gw..example.com"}, None),
        ({"hostname": "gw example"}, None),
        ({"workers": 2}, None),
        ({"workers": 0}, None),
        ({"workers": "2"}, None),
        ({"nonsense": 1}, None),
        ({"limits": {"recipients": 50}}, None),
        ({"limits": {"recipient": 50}}, None),
        ({"limits": 5}, None),
        ({"limits": {"message_size": "25MiB"}}, None),
        ({"limits": {"message_size": 1000000}}, None),
        ({"limits": {"message_size": "25"}}, None),
        ({"timeouts": {"command": "5m"}}, None),
        ({"timeouts": {"command": 30.5}}, None),
        ({"timeouts": {"command": "5"}}, None),
        ({"timeouts": {"command": "off"}}, None),
        ({"timeouts": {"session": "off"}}, None),
        ({"telemetry": {"probes": True}}, None),
        ({"telemetry": {"probes": "yes"}}, None),
        ({"delivery": {"strategy": "buffered"}}, None),
        ({"delivery": {"strategy": "Buffered"}}, None),
        ({"listener": [{"address": ["127.0.0.1:0", "unix:/tmp/x"], "allow": ["10.0.0.0/8", "fd00::1"]}]}, None),
        ({"listener": [{"address": []}]}, None),
        ({"listener": [{"address": "127.0.0.1:0"}]}, None),
        ({"listener": [{"address": 2525}]}, None),
        ({"listener": [{"allow": ["everybody"]}]}, None),
        ({"listener": {}}, None),
        (
            {
                "upstream": [
                    {"url": "smtps://mail.example", "senders": ["*@example.com", "<>"]},
                    {"url": "smtp://[::1]"},
                ]
            },
            None,
        ),
        ({"upstream": [{"url": "http://mail.example"}]}, None),
        ({"status": {"address": "off"}}, None),
        ({"log": {"level": "loud"}}, None),
        # Beyond a schema: what contradicts each other, and whether a file can be read.
        ({"listener": [{"tls": "starttls"}]}, True),
        ({"listener": [{"auth": "required", "auth_users_file": "/nowhere/users"}]}, True),
    ],
)
def test_the_schema_judges_as_the_loader_does(document: dict[str, Any], judge: bool | None) -> None:
    assert is_valid(document) is (loads(document) if judge is None else judge)


def test_the_schema_tells_the_meaning_and_the_default() -> None:
    recipients = json_schema()["properties"]["limits"]["properties"]["recipients"]
    assert recipients["description"].startswith("recipients of one transaction (RFC 5321")
    assert recipients["description"].endswith("Default: `1000`")
