"""Connections to the database: to its primary, checked before use, and the meaning of their failures.

A committing connection never gets a timeout, and no task that waits for it is cancelled: asyncpg would send a cancel
request, upon which PostgreSQL stops waiting for its synchronous standby and leaves the commit on the primary alone. To
give up, call `terminate()`.
"""

import asyncio
import logging
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import parse_qs, urlsplit, urlunsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from otel_smtp.spool.messages import SpoolError, StorageAway, StorageFull
from otel_smtp.spool.postgresql import schema as schemas

logger: Final = logging.getLogger("otel_smtp.spool.postgresql.connecting")

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection

CONNECT_SECONDS: Final = 10.0
"""How long all hosts of the URL together may take to connect; and then the connected one, to describe itself."""
CLOSE_SECONDS: Final = 2.0
LEAST_VERSION: Final = 150_000  # in the format of server_version_num
RETRY_SECONDS: Final = (0.1, 5.0)  # first and longest wait between attempts to connect
LOCK_SECONDS: Final = 2
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1", "")

_OF_A_SESSION: Final = (
    "jit",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "tcp_keepalives_idle",
    "tcp_keepalives_interval",
    "tcp_keepalives_count",
    "tcp_user_timeout",
)
"""Settings of our connections that a connection pooler does not support."""

_LOST: Final = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.exceptions.InternalClientError,
)
"""Errors that leave a statement's outcome unknown."""

_AGAIN: Final = (
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.ReadOnlySQLTransactionError,
)
"""Errors of a rolled-back transaction that may succeed when repeated."""


@dataclass(frozen=True, slots=True)
class QueueLocation:
    """The location of a queue.

    Attributes:
        url: as for libpq; several hosts are tried in turn, and the primary is used.
        takeover_seconds: the silence after which other gateways take over a gateway's deliveries.
    """

    url: str
    schema: str = schemas.DEFAULT_SCHEMA
    takeover_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """A server's description of itself.

    Attributes:
        backend: its process for this connection.
        has_standby: a commit waits for one.
        started_at: when the server was started, by which it differs from all others.
    """

    backend: int
    version: str
    has_standby: bool
    installation: str
    started_at: str


def is_lost(error: BaseException) -> bool:
    """Whether a statement's outcome is unknown: its connection broke, or the server was stopped."""
    # A ValueError of asyncpg means an argument that it cannot encode: nothing was sent.
    return isinstance(error, _LOST) and not isinstance(error, ValueError)


def may_succeed_again(error: BaseException) -> bool:
    """Whether a statement had no effect, and may succeed when repeated."""
    return isinstance(error, _AGAIN)


def is_of_replica(error: BaseException) -> bool:
    """Whether a connection's server is no longer the primary: a new connection may find the one that is."""
    return isinstance(error, asyncpg.ReadOnlySQLTransactionError)


def storage_error(error: BaseException) -> SpoolError:
    """The spool error for a failure of the database."""
    if isinstance(error, SpoolError):
        return error
    if isinstance(error, asyncpg.DiskFullError):
        return StorageFull(f"the database's disk is full: {error}")
    if is_lost(error) or may_succeed_again(error) or isinstance(error, asyncpg.InsufficientResourcesError):
        return StorageAway(f"the database cannot be reached: {_words(error)}")
    if isinstance(error, asyncpg.PostgresError):
        return StorageAway(f"the database refused a statement: {error.sqlstate} {_words(error)}")
    return StorageAway(f"the database failed: {_words(error)}")


def _words(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__


def _tls(url: str) -> ssl.SSLContext | None:
    """Verified TLS, unless the URL decides otherwise or the server is on this machine; None: as in the URL."""
    parts = urlsplit(url)
    given = parse_qs(parts.query)
    if "sslmode" in given or "host" in given:
        return None
    hosts = parts.netloc.rpartition("@")[2].split(",")
    names = [one[1 : one.find("]")] if one.startswith("[") else one.partition(":")[0] for one in hosts]
    if all(name in _LOOPBACK or name.startswith(("/", "%2F", "%2f")) for name in names):
        return None
    return ssl.create_default_context()


def _of_each_host(url: str) -> list[str]:
    """One URL for each host in a URL."""
    parts = urlsplit(url)
    login, at, hosts = parts.netloc.rpartition("@")
    if "," not in hosts:
        return [url]
    return [urlunsplit(parts._replace(netloc=f"{login}{at}{host}")) for host in hosts.split(",")]


async def _to_primary(place: QueueLocation, purpose: str) -> Connection:
    """Connect to the first host that is a primary.

    Each host gets its share of the time: a silent or missing host must not keep us from the one promoted in its place.
    """
    context = _tls(place.url)
    urls = _of_each_host(place.url)
    fault: Exception | None = None
    for url in urls:
        try:
            return await asyncpg.connect(
                url,
                timeout=CONNECT_SECONDS / len(urls),
                target_session_attrs=SessionAttribute.primary,
                ssl=context,
                server_settings={
                    "application_name": f"otel-smtp {purpose}",
                    "timezone": "UTC",
                    "jit": "off",
                    "lock_timeout": f"{LOCK_SECONDS}s",
                    "idle_in_transaction_session_timeout": f"{min(10.0, place.takeover_seconds):.0f}s",
                    "tcp_keepalives_idle": "5",
                    "tcp_keepalives_interval": "5",
                    "tcp_keepalives_count": "3",
                    "tcp_user_timeout": "15000",
                },
            )
        except (OSError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError) as error:
            fault = error
        except asyncpg.TargetServerAttributeNotMatched as error:
            fault = fault or error  # another one's silence is the better explanation
    assert fault is not None
    raise fault


async def connect(
    place: QueueLocation, *, purpose: str, checks_schema: bool = True, checks_rights: bool = True
) -> tuple[Connection, ServerFacts]:
    """Connect to the primary, and check that it can be trusted with mail.

    Args:
        purpose: shown by the server with the connection.
        checks_rights: it must have all rights that a gateway needs.

    Raises:
        SpoolError: the server, the database or our rights do not suffice; the text says what to do.
        StorageAway: no server answers now.
    """
    try:
        connection = await _to_primary(place, purpose)
    except (asyncpg.InvalidPasswordError, asyncpg.InvalidAuthorizationSpecificationError) as error:
        raise SpoolError(
            f"the database refused the login: {_words(error)}; see user and password of spool.url"
        ) from error
    except asyncpg.InvalidCatalogNameError as error:
        raise SpoolError(f"there is no such database: {_words(error)}; see spool.url") from error
    except asyncpg.TargetServerAttributeNotMatched as error:
        raise StorageAway("spool.url names only read-only replicas; name the primary too") from error
    except (asyncpg.ClientConfigurationError, ValueError) as error:
        raise SpoolError(f"spool.url is not understood: {_words(error)}") from error
    except (OSError, TimeoutError) as error:
        raise StorageAway(f"no PostgreSQL answers: {_words(error)}") from error
    except asyncpg.ProtocolViolationError as error:
        raise SpoolError(
            f"a connection pooler answers, and refuses our settings: {_words(error)}; connect directly, or let "
            f"PgBouncer pool by session, with ignore_startup_parameters = {', '.join(_OF_A_SESSION)}"
        ) from error
    except asyncpg.PostgresError as error:
        raise StorageAway(f"the database took no connection: {_words(error)}") from error
    # A server may fall silent here too.
    watchdog = asyncio.get_running_loop().call_later(CONNECT_SECONDS, connection.terminate)
    try:
        facts = await _check(connection, place, checks_schema=checks_schema, checks_rights=checks_rights)
    except BaseException as error:
        connection.terminate()
        if isinstance(error, SpoolError) or not isinstance(error, Exception):
            raise
        raise storage_error(error) from error
    finally:
        watchdog.cancel()
    return connection, facts


async def _check(
    connection: Connection, place: QueueLocation, *, checks_schema: bool, checks_rights: bool
) -> ServerFacts:
    row = await connection.fetchrow(
        "SELECT pg_backend_pid() AS backend, version(), current_setting('server_version_num')::int AS number,"
        " current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,"
        " current_setting('synchronous_commit') AS synchronous_commit, pg_is_in_recovery() AS is_replica,"
        " current_setting('default_transaction_read_only') AS read_only,"
        " current_setting('synchronous_standby_names') <> '' AS has_standby, current_user AS name,"
        " pg_postmaster_start_time()::text AS started_at"
    )
    assert row is not None
    if row["number"] < LEAST_VERSION:
        raise SpoolError(f"{row['version']}: PostgreSQL 15 or newer is needed")
    for name in ("fsync", "full_page_writes"):
        if row[name] != "on":
            raise SpoolError(
                f"the server has {name} = {row[name]}, and would lose mail in a crash; set {name} = on there"
            )
    if row["synchronous_commit"] in ("off", "local"):
        raise SpoolError(
            f"the server has synchronous_commit = {row['synchronous_commit']} for {row['name']}, and would answer "
            f"before mail is durable; run there: ALTER ROLE {row['name']} SET synchronous_commit = on"
        )
    if row["is_replica"] or row["read_only"] == "on":
        raise StorageAway("the server is read-only: a replica, or default_transaction_read_only is on")
    if row["synchronous_commit"] == "remote_write":
        await connection.execute("SET synchronous_commit = on")
    installation = ""
    if checks_schema:
        found = await _schema_version(connection, place.schema, row["name"])
        if (why := schemas.why_unusable(found, place.schema)) is not None:
            raise SpoolError(why)
        if checks_rights:
            await _check_rights(connection, place.schema, row["name"])
        quoted = schemas.quoted(place.schema)
        installation = str(await connection.fetchval(f"SELECT installation FROM {quoted}.meta"))  # noqa: S608
    return ServerFacts(row["backend"], row["version"], row["has_standby"], installation, row["started_at"])


async def _schema_version(connection: Connection, schema: str, role: str) -> tuple[int, int] | None:
    try:
        return await schemas.version_of(connection, schema)
    except asyncpg.InsufficientPrivilegeError as error:
        raise _no_rights(schema, f"{schema}.meta", role) from error


async def _check_rights(connection: Connection, schema: str, role: str) -> None:
    wanted = [(f"{schemas.quoted(schema)}.{table}", right) for table in schemas.TABLES for right in _rights(table)]
    missing = await connection.fetch(
        "SELECT one.name, string_agg(one.what, ', ') AS rights FROM unnest($1::text[], $2::text[]) AS one(name, what)"
        " WHERE to_regclass(one.name) IS NULL OR NOT has_table_privilege(to_regclass(one.name), one.what)"
        " GROUP BY one.name ORDER BY one.name LIMIT 1",
        [name for name, _ in wanted],
        [right for _, right in wanted],
    )
    if missing:
        raise _no_rights(schema, missing[0]["name"], role, missing[0]["rights"])


def _rights(table: str) -> tuple[str, ...]:
    return ("SELECT",) if table == "meta" else ("SELECT", "INSERT", "UPDATE", "DELETE")


def _no_rights(schema: str, table: str, role: str, rights: str = "SELECT") -> SpoolError:
    return SpoolError(
        f"{role} may not {rights} in {table}; as its owner run: GRANT USAGE ON SCHEMA {schema} TO {role}; "
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}; "
        f"REVOKE INSERT, UPDATE, DELETE ON {schema}.meta FROM {role}"
    )


async def close(connection: Connection | None) -> None:
    """Close in order, or terminate."""
    if connection is None or connection.is_closed():
        return
    try:
        await connection.close(timeout=CLOSE_SECONDS)
    except Exception:  # noqa: BLE001 - it is gone either way
        connection.terminate()


class LastingConnection:
    """One connection that is renewed whenever it is lost.

    Args:
        made: called with each new connection, before any other use.
        checks_rights: see `connect`.

    Attributes:
        facts: of the current connection's server, or of the last one's.
        fault: why there is none, if so.
    """

    def __init__(
        self,
        place: QueueLocation,
        purpose: str,
        made: "Callable[[Connection, ServerFacts], None] | None" = None,
        *,
        checks_rights: bool = True,
    ) -> None:
        self._place = place
        self._checks_rights = checks_rights
        self._purpose = purpose
        self._made = made
        self._connection: Connection | None = None
        self._wait = RETRY_SECONDS[0]
        self.facts: ServerFacts | None = None
        self.fault: SpoolError | None = None
        self.is_closed = False

    @property
    def present(self) -> Connection | None:
        """The connection, if there is one."""
        if self._connection is not None and self._connection.is_closed():
            self._connection = None
        return self._connection

    async def get(self) -> Connection:
        """The connection; makes one attempt to connect if there is none.

        Raises:
            SpoolError: see `connect`.
        """
        if self.is_closed:
            raise SpoolError("the queue is closed")
        if (present := self.present) is not None:
            return present
        try:
            connection, facts = await connect(self._place, purpose=self._purpose, checks_rights=self._checks_rights)
        except SpoolError as error:
            self.fault = error
            raise
        self._connection, self.facts, self.fault = connection, facts, None
        self._wait = RETRY_SECONDS[0]
        if self._made is not None:
            self._made(connection, facts)
        return connection

    def next_wait(self) -> float:
        """Seconds until the next attempt: longer each time, and random, so that gateways do not retry together.

        A new connection, or `forget_faults`, resets it.
        """
        wait, self._wait = self._wait, min(RETRY_SECONDS[1], self._wait * 2)
        return wait * (0.5 + random.random())  # noqa: S311 - jitter, no secret

    def forget_faults(self) -> None:
        """The connection works: after a much later failure the waits start short again."""
        self._wait = RETRY_SECONDS[0]

    def terminate(self) -> None:
        """Abort the connection: callers that wait for an answer over it learn that the outcome is unknown."""
        if self._connection is not None:
            self._connection.terminate()

    def leave_former(self, started_at: str) -> None:
        """Abort a connection to another server than the one started then: it was the primary, and may never answer."""
        if self.facts is not None and self.facts.started_at != started_at:
            self.terminate()

    async def close(self) -> None:
        """Idempotent."""
        self.is_closed = True
        connection, self._connection = self._connection, None
        await close(connection)
