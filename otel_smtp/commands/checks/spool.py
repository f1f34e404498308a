"""The spool's directory: whether it can be used, or which gateway owns it."""

from otel_smtp.commands.checks.findings import Finding
from otel_smtp.config import Settings
from otel_smtp.gateway.wiring import least_free_octets, shared_store
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.messages import SpoolError


def check_spool(settings: Settings) -> Finding | None:
    """Check the spool's directory without changing it; None without one."""
    directory = settings.spool.directory
    if settings.delivery.mode == "direct":
        return None
    if directory is None:
        return None
    subject = f"spool {directory}"
    spool = SpoolDirectory(directory)
    try:
        owner = spool.try_out()
        octets, _ = SpoolDirectory(next(path for path in (directory, *directory.parents) if path.is_dir())).room()
    except (SpoolError, OSError) as error:
        return Finding("failed", subject, str(error))
    if owner is not None:
        return Finding("ok", subject, f"in use by a gateway: {owner}")
    needed = least_free_octets(settings)
    if octets < needed:
        return Finding("failed", subject, f"has {octets >> 20} MiB free; it refuses mail below {needed >> 20} MiB")
    return Finding("ok", subject, f"is usable, {octets >> 20} MiB free")


async def check_shared_queue(settings: Settings) -> Finding | None:
    """Check the database of a shared queue; None in a mode without one."""
    if settings.delivery.mode == "direct" or settings.spool.url is None:
        return None
    subject = f"spool.url, schema {settings.spool.schema}"
    try:
        store = shared_store(settings.spool, name="check", is_gateway=False)
        recovery = await store.open()
        try:
            sharing = len((await store.company()).gateways)
        finally:
            await store.close()
    except SpoolError as error:
        return Finding("failed", subject, str(error))
    return Finding("ok", subject, "; ".join(["is usable", f"{sharing} gateways share it", *recovery.remarks]))
