"""The store in a PostgreSQL database: one queue for several gateways. Needs asyncpg."""

from otel_smtp.spool.postgresql.connecting import Place
from otel_smtp.spool.postgresql.schema import migrate
from otel_smtp.spool.postgresql.store import PostgresqlStore

__all__ = ["Place", "PostgresqlStore", "migrate"]
