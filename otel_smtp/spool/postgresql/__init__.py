"""The store in a PostgreSQL database: one queue for several gateways. Needs asyncpg."""

from collections.abc import Sequence

from otel_smtp.spool.postgresql.connecting import QueueLocation, close, connect, storage_error
from otel_smtp.spool.postgresql.schema import migrate
from otel_smtp.spool.postgresql.store import PostgresqlStore

__all__ = ["PostgresqlStore", "QueueLocation", "migrate", "migrate_place"]


async def migrate_place(place: QueueLocation, *, dry_run: bool) -> Sequence[str]:
    """See `schema.migrate`.

    Raises:
        SpoolError: it cannot be done.
    """
    connection, _ = await connect(place, purpose="migrate", checks_schema=False)
    try:
        return await migrate(connection, place.schema, dry_run=dry_run)
    except Exception as error:
        raise storage_error(error) from error
    finally:
        await close(connection)
