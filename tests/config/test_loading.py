"""Where settings come from, which source wins, and how each refusal reads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from otel_smtp.config import Flag, Secret, Settings, SettingsError, assignment, describe, load
from otel_smtp.observing import Endpoint
from otel_smtp.smtp.states import TlsMode

UPSTREAM = {"OTELSMTP_UPSTREAM": "smtp://127.0.0.1:1025"}


def problems_of(**sources: Any) -> list[str]:
    with pytest.raises(SettingsError) as refusal:
        load(**sources)
    return str(refusal.value).splitlines()


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str, name: str = "gw.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


# Precedence ---------------------------------------------------------------------------------------------------


def test_an_upstream_alone_suffices() -> None:
    settings = load(upstream=["smtp://127.0.0.1:1025"])
    assert settings.listener[0].address == (Endpoint("127.0.0.1", 2525), Endpoint("::1", 2525))
    assert settings.upstream[0].name == "127.0.0.1:1025"
    assert settings.limits.message_size == 25 * 1024 * 1024
    assert settings.delivery.mode == "direct"


@pytest.mark.parametrize(
    ("in_file", "in_environment", "in_flag", "expected", "origin"),
    [
        (None, None, None, 1000, None),
        (11, None, None, 11, "FILE"),
        (11, "22", None, 22, "environment OTELSMTP_LIMITS__RECIPIENTS"),
        (11, "22", "33", 33, "--set limits.recipients"),
        (None, "22", None, 22, "environment OTELSMTP_LIMITS__RECIPIENTS"),
        (11, "", None, 11, "FILE"),  # an empty variable counts as not set
        (11, None, "33", 33, "--set limits.recipients"),
    ],
)
def test_flags_win_over_the_environment_over_the_file_over_defaults(
    write: Any,
    in_file: int | None,
    in_environment: str | None,
    in_flag: str | None,
    expected: int,
    origin: str | None,
) -> None:
    file = write(f"[limits]\nrecipients = {in_file}\n" if in_file else "")
    environ = dict(UPSTREAM)
    if in_environment is not None:
        environ["OTELSMTP_LIMITS__RECIPIENTS"] = in_environment
    flags = [assignment(f"limits.recipients={in_flag}")] if in_flag else []
    settings = load(file=file, environ=environ, flags=flags)
    assert settings.limits.recipients == expected
    assert settings.origins.get("limits.recipients") == (str(file) if origin == "FILE" else origin)


def test_sources_are_merged_key_by_key(write: Any) -> None:
    file = write(
        '[[listener]]\nname = "a"\nproxy_protocol_from = ["10.0.0.0/8"]\n[[upstream]]\nurl = "smtps://m.example"\n'
    )
    environ = {
        "OTELSMTP_LISTENER__0__NAME": "b",
        "OTELSMTP_LISTENER__1__ADDRESS": "127.0.0.1:2526,[::1]:2526",
        "OTELSMTP_LISTENER__1__NAME": "c",
        "OTELSMTP_UPSTREAM__0__TIMEOUT__CONNECT": "5s",
    }
    settings = load(file=file, environ=environ)
    assert [listener.name for listener in settings.listener] == ["b", "c"]
    assert str(settings.listener[0].proxy_protocol_from[0]) == "10.0.0.0/8"
    assert settings.listener[1].address == (Endpoint("127.0.0.1", 2526), Endpoint("::1", 2526))
    assert settings.upstream[0].timeout.connect == 5.0
    assert settings.upstream[0].timeout.greeting == 60.0


def test_the_environment_names_the_file_and_a_flag_another(write: Any) -> None:
    first, second = write("workers = 2", "first.toml"), write("workers = 3", "second.toml")
    environ = {**UPSTREAM, "OTELSMTP_CONFIG": str(first)}
    assert load(environ=environ).workers == 2
    assert load(environ=environ, file=second).workers == 3


def test_short_forms_for_one_listener_and_one_upstream(write: Any) -> None:
    file = write('[[upstream]]\nname = "p"\nurl = "smtp://127.0.0.1:1"\n[[listener]]\nname = "in"\n')
    environ = {"OTELSMTP_LISTEN": "127.0.0.1:0, [::1]:0", "OTELSMTP_UPSTREAM": "smtp://127.0.0.1:2"}
    settings = load(file=file, environ=environ)
    assert settings.listener[0].name == "in"
    assert settings.listener[0].address == (Endpoint("127.0.0.1", 0), Endpoint("::1", 0))
    assert (settings.upstream[0].name, settings.upstream[0].url.endpoint.port) == ("p", 2)
    settings = load(
        file=file, environ=environ, upstream=["smtp://127.0.0.1:3", "smtp://127.0.0.1:4"], listen=["[::1]:7"]
    )
    assert [upstream.url.endpoint.port for upstream in settings.upstream] == [3, 4]
    assert settings.listener[0].address == (Endpoint("::1", 7),)


def test_short_forms_are_refused_where_it_is_not_clear_which_is_meant(write: Any) -> None:
    file = write('[[upstream]]\nurl = "smtp://a.example"\n[[upstream]]\nurl = "smtp://b.example"\n')
    (problem,) = problems_of(file=file, environ=UPSTREAM)
    assert problem == ("environment OTELSMTP_UPSTREAM: 2 tables [[upstream]] are set: name one, as upstream.0.url")


def test_variables_that_kubernetes_makes_for_a_service_are_no_settings() -> None:
    environ = {
        **UPSTREAM,
        "OTELSMTP_SERVICE_HOST": "10.0.0.1",
        "OTELSMTP_SERVICE_PORT": "25",
        "OTELSMTP_SERVICE_PORT_SMTP": "25",
        "OTELSMTP_PORT": "tcp://10.0.0.1:25",
        "OTELSMTP_PORT_25_TCP_ADDR": "10.0.0.1",
    }
    assert load(environ=environ).origins.keys() == {"upstream.0.url"}


def test_a_tree_of_plain_values_stands_in_for_a_file() -> None:
    values = {"listener": [{"address": ["127.0.0.1:0"]}], "upstream": [{"url": "lmtp:///run/lmtp"}]}
    settings = load(values=values)
    assert settings.upstream[0].url.endpoint == Endpoint("/run/lmtp")
    assert problems_of(values={"nonsense": 1})[0].startswith("settings: nonsense: unknown key")


# Secrets and paths --------------------------------------------------------------------------------------------

SUBMISSION = '[[upstream]]\nurl = "smtps://m.example"\nusername = "relay"\n'


def test_a_secret_comes_out_of_a_file_relative_to_the_settings_without_its_line_end(write: Any) -> None:
    write(" pass word \n", "password")
    upstream = load(file=write(SUBMISSION + 'password_file = "password"\n')).upstream[0]
    assert upstream.password == Secret(" pass word ")
    assert upstream.password_file is not None
    assert upstream.password_file.is_absolute()


def test_a_byte_order_mark_is_no_part_of_a_secret_or_of_the_settings(write: Any) -> None:
    write("\ufeffpass word\r\n", "password")
    file = write("\ufeff" + SUBMISSION + 'password_file = "password"\n')
    assert load(file=file).upstream[0].password == Secret("pass word")


def test_the_later_source_of_a_secret_wins_whichever_spelling_it_has(write: Any) -> None:
    password = write("from-file", "password")
    file = write(SUBMISSION + 'password_file = "password"\n')
    settings = load(file=file, environ={"OTELSMTP_UPSTREAM__0__PASSWORD": "from-environment"})
    assert settings.upstream[0].password == Secret("from-environment")
    file = write(SUBMISSION + 'password = "in-settings"\n')
    settings = load(file=file, environ={"OTELSMTP_UPSTREAM__0__PASSWORD_FILE": str(password)})
    assert settings.upstream[0].password == Secret("from-file")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"two\nlines\n", "the file's content is invalid; allowed: text of one line"),
        (b"", "the file's content is invalid; allowed: text of one line"),
        (b"\xff\xfe", "the file's content is not UTF-8 text"),
    ],
)
def test_a_file_that_holds_no_secret_is_refused_without_telling_it(write: Any, content: bytes, expected: str) -> None:
    path = write("", "password")
    path.write_bytes(content)
    (problem, *_) = problems_of(file=write(SUBMISSION + 'password_file = "password"\n'))
    assert problem.endswith(f'upstream.0.password_file = "password": {expected}')


@pytest.mark.timeout(20)  # an open of the pipe would wait for a writer that never comes
def test_a_pipe_in_place_of_a_secret_is_refused_and_not_waited_for(write: Any) -> None:
    file = write(SUBMISSION + 'password_file = "pipe"\n')
    os.mkfifo(file.parent / "pipe")
    problems = problems_of(file=file)
    assert any('password_file = "pipe": not a regular file' in problem for problem in problems)


def test_no_secret_stands_in_a_refusal_or_in_a_representation(write: Any) -> None:
    file = write(
        '[[upstream]]\nurl = "smtp://m.example"\nusername = "relay"\npassword = "hunter2"\npassword_file = "nowhere"\n'
        '[telemetry]\naddresses_hash_key = ["hunter2"]\n[spool]\nurl = "mysql://u:hunter2@h/d"\n'
    )
    problems = problems_of(file=file)
    assert len(problems) == 4
    assert "hunter2" not in "\n".join(problems)
    settings = load(file=write(SUBMISSION + 'password = "hunter2"\n'))
    assert "hunter2" not in repr(settings)


def test_certificates_are_relative_to_the_file_that_names_them(write: Any, tmp_path: Path) -> None:
    write("", "c.pem"), write("", "k.pem")
    file = write('[[listener]]\ntls = "starttls"\ntls_cert = "c.pem"\ntls_key = "k.pem"\n')
    listener = load(file=file, environ=UPSTREAM).listener[0]
    assert (listener.tls, listener.tls_cert, listener.tls_key) == (
        TlsMode.STARTTLS,
        tmp_path / "c.pem",
        tmp_path / "k.pem",
    )


@pytest.mark.parametrize("key", ["password_file", "ca_file"])
def test_a_file_that_this_user_may_not_even_look_for_is_refused(write: Any, key: str) -> None:
    """As one in another user's directory, whose error is EACCES, which root never gets."""
    name = "x" * 300
    (problem, *_) = problems_of(file=write(SUBMISSION + f'{key} = "{name}"\n'))
    assert f"upstream.0.{key} = " in problem
    assert ": cannot be read: File name too long: /" in problem
    assert len(problem) < 500


# Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("limits.recipient = 5", "limits.recipient: unknown key; did you mean recipients?"),
        ("[limts]\nerrors = 5", "limts: unknown key; did you mean limits?"),
        ("[zzz]", "zzz: unknown key; known are hostname, workers, listener, limits, timeouts"),
        ('limits.recipients = "many"', 'limits.recipients = "many": allowed: a whole number from 1 to 2147483647'),
        ("limits.recipients = 0", "limits.recipients = 0: allowed: a whole number from 1 to"),
        ("limits = 5", "limits = 5: allowed: a table, headed [limits]"),
        ("listener = {}", "listener = { ... }: allowed: tables, each headed [[listener]]"),
        ("listener = []", "listener = []: allowed: tables, each headed [[listener]]"),
        ('timeouts.command = "5"', 'timeouts.command = "5": allowed: seconds as a number or text such as "30s"'),
        ("limits.command_line = 100", 'limits.command_line = 100: allowed: octets as a number or text such as "25MiB"'),
        ('delivery.mode = "fast"', 'delivery.mode = "fast": allowed: direct, queue, direct-then-queue'),
        ('hostname = "not a name"', 'hostname = "not a name": allowed: a host name'),
        ("[[listener]]\ntls = true", "listener.0.tls = true: allowed: off, starttls, implicit"),
        ('[[listener]]\nallow = ["10.1.2.3/8"]', 'listener.0.allow = ["10.1.2.3/8"]: host bits are set'),
        ('[[listener]]\ntls_key = "k.pem"', 'listener.0.tls_key = "k.pem": no such file: '),
        ('[[upstream]]\nname = "x"', "upstream.0.url: is missing; allowed: smtp://host:port (clear)"),
        ('status.address = "localhost"', 'status.address = "localhost": allowed: "host:port", "[::1]:port", "off"'),
        ('log.level = "loud\\u0007"', 'log.level = "loud\\x07": allowed: debug, info, warning, error'),
        ("[[upstream]]\nurl = 'smtp://h'\npassword_file = [1]", "upstream.0.password_file = [1]: allowed: a path"),
        ("workers = " + "1" * 300, "..."),
    ],
)
def test_a_problem_names_file_key_value_and_what_is_allowed(write: Any, toml: str, expected: str) -> None:
    file = write(toml)
    environ = {} if "upstream" in toml else UPSTREAM
    (problem,) = problems_of(file=file, environ=environ)
    assert problem.startswith(f"{file}: ")
    assert expected in problem
    assert len(problem) < 400


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"OTELSMTP_LIMITS__RECIPIENTS": "x"},
            'OTELSMTP_LIMITS__RECIPIENTS: limits.recipients = "x": allowed: a whole',
        ),
        ({"OTELSMTP_LIMITS_RECIPIENTS": "5"}, "limits_recipients: unknown key"),
        ({"OTELSMTP_LIMITS_RECIPIENTS": "5"}, "levels are separated by __"),
        ({"OTELSMTP_LISTENER__TLS": "off"}, "listener: there can be several: give a number, as listener.0.KEY"),
        ({"OTELSMTP_LISTENER__2__TLS": "off"}, "listener.2: there is no listener.0 before it"),
        ({"OTELSMTP_LISTENER__0": "x"}, "listener.0: is a table; give one of its keys: name, address"),
        ({"OTELSMTP_LIMITS": "5"}, "limits: is a table; give one of its keys: message_size"),
        ({"OTELSMTP_WORKERS__X": "5"}, "workers.x: workers is a value and has no keys below it"),
        ({"OTELSMTP_LISTEN": "nowhere"}, 'OTELSMTP_LISTEN: listener.0.address = ["nowhere"]: allowed: a list'),
        (
            {"OTELSMTP_UPSTREAM": "http://x"},
            'OTELSMTP_UPSTREAM: upstream.0.url = "http://x": allowed: smtp://host:port',
        ),
        ({"OTELSMTP_UPSTREAM": "smtp://u:hunter2@h"}, 'upstream.0.url = "***": logs and process lists show URLs'),
        (
            {"OTELSMTP_CONFIG": "/nonexistent/gw.toml"},
            "/nonexistent/gw.toml: cannot be read: No such file or directory (OTELSMTP_CONFIG names it)",
        ),
    ],
)
def test_a_refusal_names_the_variable(environ: Mapping[str, str], expected: str) -> None:
    (problem,) = problems_of(environ={**UPSTREAM, **environ})
    assert expected in problem
    assert problem.startswith(("environment OTELSMTP_", "/nonexistent"))


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        (b"a = ", "is not TOML: "),
        (b"a = 1\nb = $", "(at line 2, column 5)"),
        (b"\xff", "is not UTF-8, which TOML must be"),
    ],
)
def test_a_file_that_is_no_toml_is_refused_with_the_place(tmp_path: Path, toml: bytes, expected: str) -> None:
    file = tmp_path / "gw.toml"
    file.write_bytes(toml)
    (problem,) = problems_of(file=file)
    assert problem.startswith(f"{file}: ")
    assert expected in problem


def test_a_directory_is_no_settings_file(tmp_path: Path) -> None:
    assert problems_of(file=tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


def test_messages_speak_of_parameters_to_programs_and_of_options_to_people() -> None:
    for is_command, at in ((False, "load(listen=...)"), (True, "--listen")):
        with pytest.raises(SettingsError) as told:
            load(listen=["foo"], is_command=is_command)
        assert f"{at}: listener.0.address = " in str(told.value)
        assert ("--upstream" in str(told.value)) is is_command
    with pytest.raises(SettingsError, match=r"^load\(upstream=\.\.\.\): upstream\.0\.url"):
        load(upstream=["nonsense"])


def test_all_problems_are_reported_at_once_each_with_its_source(write: Any) -> None:
    file = write('nonsense = 1\n[limits]\nerrors = "x"\n')
    problems = problems_of(
        file=file,
        environ={"OTELSMTP_WORKERS": "0"},
        flags=[assignment("log.level=loud"), Flag("--status", "status.address", "?")],
    )
    assert [problem.partition(": ")[0] for problem in problems] == [
        str(file),
        "settings",
        "environment OTELSMTP_WORKERS",
        str(file),
        "--status",
        "--set log.level",
    ]
    assert problems[1].startswith("settings: upstream: none is set; pass upstream=[")


def test_an_assignment_needs_an_equals_sign() -> None:
    with pytest.raises(SettingsError, match='--set = "workers": allowed: key=value'):
        assignment("workers")


def test_settings_without_an_upstream_on_request() -> None:
    assert load(needs_upstream=False).upstream == ()


def test_a_refused_upstream_keeps_its_number_for_the_others(write: Any) -> None:
    file = write('[[upstream]]\nurl = "x"\n[[upstream]]\nurl = "smtp://h.example"\nusername = "u"\npassword = "p"\n')
    problems = problems_of(file=file)
    assert [problem.split()[1] for problem in problems] == ["upstream.0.url", "upstream.1.username"]


# What is derived ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "given", "expected"),
    [
        ("smtp://127.0.0.1:1025", None, "inject"),
        ("smtp://localhost:1025", None, "inject"),
        ("lmtp:///run/lmtp", None, "inject"),
        ("smtps://m.example", None, "strip"),
        ("smtps://m.example", "keep", "keep"),
    ],
)
def test_trace_context_is_passed_on_to_loopback_upstreams_only_by_default(
    url: str, given: str | None, expected: str
) -> None:
    upstream = {"url": url} | ({"trace_context": given} if given else {})
    assert load(values={"upstream": [upstream]}).upstream[0].trace_context == expected


@pytest.mark.parametrize(
    ("spool", "expected"),
    [
        ({}, 4 * 3600.0),
        ({"max_age": "8h"}, 4 * 3600.0),
        ({"max_age": "4h"}, 2 * 3600.0),
        ({"max_age": "1h"}, 1800.0),
        ({"max_age": "1h", "warn_after": "50m"}, 3000.0),
        ({"max_age": "1h", "warn_after": "off"}, None),
    ],
)
def test_the_warning_of_a_delay_comes_before_the_end(spool: dict[str, str], expected: float | None) -> None:
    assert load(values={"spool": spool}, needs_upstream=False).spool.warn_after == expected


@pytest.mark.parametrize(
    ("mode", "reply", "expected"),
    [("direct", None, 570.0), ("direct-then-queue", None, 570.0), ("queue", None, 600.0), ("queue", "1m", 60.0)],
)
def test_only_where_a_client_waits_the_final_reply_is_waited_for_less(
    mode: str, reply: str | None, expected: float, tmp_path: Path
) -> None:
    upstream = {"url": "smtp://127.0.0.1:1025"} | ({"timeout": {"reply": reply}} if reply else {})
    values = {"upstream": [upstream], "delivery": {"mode": mode}, "spool": {"directory": str(tmp_path)}}
    assert load(values=values).upstream[0].timeout.reply == expected


def test_the_default_of_connections_gives_way_to_the_file_limit_with_a_word() -> None:
    settings = load(environ=UPSTREAM, file_limit=100)
    assert settings.limits.connections == 25
    assert settings.warnings == ("limits.connections lowered to 25: this process may open only 100 files",)
    assert load(environ=UPSTREAM, file_limit=1024).warnings == ()


def test_connections_that_were_asked_for_and_do_not_fit_are_refused() -> None:
    (problem,) = problems_of(environ={**UPSTREAM, "OTELSMTP_LIMITS__CONNECTIONS": "26"}, file_limit=100)
    assert "limits.connections = 26: this process may open 100 files; allowed: at most a quarter, 25" in problem
    assert load(environ={**UPSTREAM, "OTELSMTP_LIMITS__CONNECTIONS": "25"}, file_limit=100).limits.connections == 25


def test_settings_cannot_be_changed() -> None:
    settings: Settings = load(environ=UPSTREAM)
    with pytest.raises(AttributeError):
        settings.workers = 2  # type: ignore[misc]


def test_a_route_for_bounces_is_the_empty_reverse_path() -> None:
    upstream = {"url": "smtps://m.example", "senders": ["<>", "*@example.com"]}
    settings = load(values={"upstream": [upstream]})
    assert settings.upstream[0].senders == ("", "*@example.com")
    assert {row.key: row.value for row in describe(settings)}["upstream.0.senders"] == "<>, *@example.com"


def test_no_file_for_the_token_may_be_said_in_words() -> None:
    settings = load(values={"upstream": [{"url": "smtp://127.0.0.1"}], "status": {"token_file": ""}})
    assert (settings.status.token, settings.status.token_file) == (None, None)
    with pytest.raises(SettingsError, match="password_file"):
        load(values={"upstream": [{"url": "smtps://a.example", "username": "u", "password_file": ""}]})


def test_no_address_may_be_said_in_words() -> None:
    tables = {"rewrite": {"sender": ""}, "spool": {"notice_sender": ""}}
    settings = load(values={"upstream": [{"url": "smtp://127.0.0.1"}], **tables})
    assert (settings.rewrite.sender, settings.spool.notice_sender) == ("", "")
