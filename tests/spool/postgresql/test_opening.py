"""What a gateway says of a database that it cannot trust with mail, and what it does to one that it can."""

import asyncio
import contextlib
import dataclasses
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from otel_smtp.spool.messages import SpoolError, StorageAway
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation, connecting, migrate
from otel_smtp.spool.postgresql import schema as schemas
from otel_smtp.spool.postgresql.connecting import connect
from tests.spool.messages import message, queued
from tests.spool.postgresql.schemas import migrate_to, new_place, store
from tests.support.fault_proxy import FaultProxy
from tests.support.ports import unclaimed_port
from tests.support.postgresql import OWNER, Server, server
from tests.support.process import until as process_until
from tests.support.tools import tool


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server whose configuration a test may change."""
    own = Server().start()
    yield own
    own.remove()


async def refused(place: QueueLocation) -> str:
    """What opening says."""
    opened = store(place)
    with pytest.raises(SpoolError) as raised:
        await opened.open()
    with pytest.raises(SpoolError):
        await queued(opened)
    return str(raised.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://127.0.0.1:1/none", "no PostgreSQL answers"),
        ("postgresql://u@127.0.0.1:port/x", "spool.url is not understood"),
    ],
)
async def test_a_wrong_url_says_so(url: str, said: str) -> None:
    assert said in await refused(QueueLocation(url))


async def test_a_database_that_is_not_there_says_so() -> None:
    assert "there is no such database" in await refused(QueueLocation(server().url("elsewhere")))


async def test_a_refused_password_says_so_without_the_password() -> None:
    running = server()
    running.do("DROP ROLE IF EXISTS locked", "CREATE ROLE locked LOGIN PASSWORD 'right'")
    url = running.url(user="locked:wrong-secret")
    said = await refused(QueueLocation(url))
    assert "the database refused the login" in said
    assert "wrong-secret" not in said


async def test_a_database_without_the_schema_says_how_to_make_it() -> None:
    assert "otel-smtp queue migrate" in await refused(QueueLocation(server().url(), "nothing_here"))


async def test_an_older_and_a_newer_schema_say_what_to_do() -> None:
    place = await new_place()
    server().do(f"UPDATE {place.schema}.meta SET version = 0, oldest_reader = 0")
    assert "bring it up to date with: otel-smtp queue migrate" in await refused(place)
    server().do(f"UPDATE {place.schema}.meta SET version = 9, oldest_reader = 8")
    assert "install a newer otel-smtp" in await refused(place)
    server().do(f"UPDATE {place.schema}.meta SET version = 9, oldest_reader = 1")
    opened = store(place)
    await opened.open()  # a release that only added
    await opened.close()


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
async def test_a_server_that_loses_mail_in_a_crash_is_refused(own_server: Server, name: str) -> None:
    place = await new_place(own_server)
    own_server.do(f"ALTER SYSTEM SET {name} = off", "SELECT pg_reload_conf()")
    try:
        own_server.wait_for(f"SELECT 1 WHERE current_setting('{name}') = 'off'")
        assert f"set {name} = on there" in await refused(place)
    finally:
        own_server.do(f"ALTER SYSTEM RESET {name}", "SELECT pg_reload_conf()")
        own_server.wait_for(f"SELECT 1 WHERE current_setting('{name}') = 'on'")
    opened = store(place)
    await opened.open()
    await opened.close()


@pytest.mark.parametrize("value", ["off", "local"])
async def test_a_role_that_does_not_wait_for_its_commits_is_refused(value: str) -> None:
    place = await new_place()
    running = server()
    running.do(
        "DROP ROLE IF EXISTS hasty",
        f"CREATE ROLE hasty LOGIN SUPERUSER; ALTER ROLE hasty SET synchronous_commit = {value}",
    )
    hasty = dataclasses.replace(place, url=running.url(user="hasty"))
    assert "ALTER ROLE hasty SET synchronous_commit = on" in await refused(hasty)


async def test_a_role_without_rights_says_which_and_how_to_grant_them() -> None:
    place = await new_place()
    running = server()
    running.do("DROP ROLE IF EXISTS poor", "CREATE ROLE poor LOGIN")
    poor = dataclasses.replace(place, url=running.url(user="poor"))
    try:
        assert f"GRANT USAGE ON SCHEMA {place.schema} TO poor" in await refused(poor)
        running.do(
            f"GRANT USAGE ON SCHEMA {place.schema} TO poor",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {place.schema} TO poor",
            f"REVOKE DELETE ON {place.schema}.dlv FROM poor",
        )
        said = await refused(poor)
        assert "DELETE" in said
        assert "dlv" in said
        running.do(f"GRANT DELETE ON {place.schema}.dlv TO poor")
        opened = store(poor)
        await opened.open()
        await queued(opened)
        await opened.close()
    finally:
        running.do("DROP OWNED BY poor", "DROP ROLE poor")


@contextlib.contextmanager
def pooled(mode: str, directory: Path, *, ignores: str = "") -> Iterator[int]:
    """PgBouncer in front of the server; its port."""
    program, port = tool("pgbouncer"), unclaimed_port()
    directory.chmod(0o755)
    users, settings = directory / "users", directory / "pgbouncer.ini"
    users.write_text(f'"{OWNER}" ""\n')
    settings.write_text(
        f"[databases]\npostgres = host=127.0.0.1 port={server().port} user={OWNER}\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\nauth_file = {users}\n"
        f"pool_mode = {mode}\nignore_startup_parameters = extra_float_digits, {ignores}\n"
    )
    command = [program, str(settings)] if os.geteuid() else ["setpriv", "--reuid=65534", program, str(settings)]
    with (directory / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            process_until(lambda: _listens(port) or None, "the pool listens")
            yield port
        finally:
            process.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_a_pool_by_transaction_is_refused_and_one_by_session_is_not(open_directory: Path) -> None:
    place = await new_place()
    url = f"postgresql://{OWNER}@127.0.0.1:{{}}/postgres"
    with pooled("session", open_directory) as port:
        said = await refused(dataclasses.replace(place, url=url.format(port)))
    assert "ignore_startup_parameters = jit, lock_timeout" in said
    ignores = said.partition("ignore_startup_parameters = ")[2]
    with pooled("transaction", open_directory, ignores=ignores) as port:
        assert "pool by session" in await refused(dataclasses.replace(place, url=url.format(port)))
    with pooled("session", open_directory, ignores=ignores) as port:
        opened = store(dataclasses.replace(place, url=url.format(port)))
        await opened.open()
        await queued(opened)
        share = opened.standing()
        assert share is not None
        assert share.gateways == 1
        await opened.close()


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that any user may look into."""
    with tempfile.TemporaryDirectory(prefix="pool-", dir="/tmp") as path:
        yield Path(path)


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port that takes connections, behind which nobody says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


async def test_a_host_that_says_nothing_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a failover, when the former primary is stopped or cut off, and its name is still the first one."""
    monkeypatch.setattr(connecting, "CONNECT_SECONDS", 2.0)
    place = await new_place()
    with silent_port() as port:
        url = place.url.replace("127.0.0.1", f"127.0.0.1:{port},127.0.0.1")
        connection, _ = await connect(dataclasses.replace(place, url=url), purpose="test")
    await connection.close()


async def test_a_host_that_says_nothing_hides_no_replica_and_no_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "CONNECT_SECONDS", 0.4)
    with silent_port() as port:
        url = server().url("elsewhere").replace("127.0.0.1", f"127.0.0.1:{port},127.0.0.1")
        assert "there is no such database" in await refused(QueueLocation(url))
        url = f"postgresql://127.0.0.1:{port},127.0.0.1:{port}/postgres"
        assert "no PostgreSQL answers" in await refused(QueueLocation(url))


async def test_a_server_that_falls_silent_while_it_is_checked_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    place = await new_place()
    monkeypatch.setattr(connecting, "CONNECT_SECONDS", 1.0)
    async with FaultProxy(server().port) as proxy:
        behind = dataclasses.replace(place, url=place.url.replace(str(server().port), str(proxy.port)))
        version_of = schemas.version_of

        async def falls_silent(connection: object, schema: str) -> object:
            proxy.swallow()
            return await version_of(connection, schema)  # type: ignore[arg-type]

        monkeypatch.setattr(schemas, "version_of", falls_silent)
        async with asyncio.timeout(30):
            with pytest.raises(StorageAway):
                await connect(behind, purpose="test")


async def test_a_comma_in_a_password_is_none_between_hosts() -> None:
    url = server().url().replace("owner@", "owner:a,b@")
    connection, _ = await connect(QueueLocation(url), purpose="test", checks_schema=False)
    await connection.close()


async def test_a_replica_is_refused(own_server: Server) -> None:
    place = await new_place(own_server)
    replica = Server(standby_of=own_server).start()
    try:
        assert "read-only replicas" in await refused(dataclasses.replace(place, url=replica.url()))
        url = replica.url().replace("127.0.0.1", "127.0.0.1:1,127.0.0.1")
        assert "no PostgreSQL answers" in await refused(dataclasses.replace(place, url=url)), "that is the primary"
    finally:
        replica.remove()


async def test_a_queue_of_the_version_before_is_brought_up_to_date_with_its_mail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = QueueLocation(server().url(), "of_before")
    with monkeypatch.context() as patched:
        patched.setattr(schemas, "STEPS", schemas.STEPS[:1])
        await migrate_to(place)
    server().do("INSERT INTO of_before.quota VALUES ('l', now(), 1)")
    assert "bring it up to date" in await refused(place)
    await migrate_to(place)
    opened = store(place)
    await opened.open()
    await opened.close()
    assert server().do("SELECT version, oldest_reader FROM of_before.meta") == [["2", "1"]]
    server().do("DROP SCHEMA of_before CASCADE")


async def test_migrating_twice_changes_nothing_and_a_dry_run_less() -> None:
    place = QueueLocation(server().url(), "made_twice")
    connection, _ = await connect(place, purpose="test", checks_schema=False)
    try:
        would = await migrate(connection, place.schema, dry_run=True)
        assert len(would) == schemas.VERSION
        assert "CREATE TABLE" in would[0]
        assert await schemas.version_of(connection, place.schema) is None
        assert await migrate(connection, place.schema, dry_run=False) == would
        assert await schemas.version_of(connection, place.schema) == (schemas.VERSION, 1)
        assert await migrate(connection, place.schema, dry_run=False) == []
        await connection.execute("UPDATE made_twice.meta SET version = 99")
        with pytest.raises(SpoolError, match="newest"):
            await migrate(connection, place.schema, dry_run=False)
    finally:
        await connection.execute("DROP SCHEMA made_twice CASCADE")
        await connection.close()


@pytest.mark.parametrize("name", ["", "a b", "A", 'x"; DROP', "pg_x", "1a", "a" * 64])
def test_a_schema_has_a_plain_name(name: str) -> None:
    with pytest.raises(SpoolError):
        schemas.quoted(name)


async def test_a_command_of_an_operator_is_no_gateway() -> None:
    place = await new_place()
    gateway = store(place)
    await gateway.open()
    operator = PostgresqlStore(place, is_gateway=False)
    try:
        one = await queued(gateway, message())
        await operator.open()
        assert [shown.id for shown in await operator.page("", 9)] == [one]
        assert [peer.name for peer in (await operator.company()).gateways] == ["a gateway"]
        with pytest.raises(SpoolError):
            await queued(operator)
    finally:
        await operator.close()
        await gateway.close()
