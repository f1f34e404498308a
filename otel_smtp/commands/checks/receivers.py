"""A receiver of outcomes: connect, verify TLS, and ask what it allows, which changes nothing there."""

from otel_smtp.commands.checks.findings import Finding
from otel_smtp.spool.outcomes.events import source_of
from otel_smtp.spool.outcomes.posting import Poster
from otel_smtp.spool.outcomes.receivers import ReceiverSettings


async def check_receiver(settings: ReceiverSettings, hostname: str) -> Finding:
    """Ask a receiver by OPTIONS (RFC 9110 9.3.7); no event is sent."""
    subject = f"notify {settings.name}"
    poster = Poster(settings)
    try:
        answer = await poster.ask(source_of(hostname))
    finally:
        await poster.close()
    if answer.why is not None or answer.status is None:
        return Finding("failed", subject, answer.why or "no answer")
    words = ["answers", "TLS verified" if settings.url.startswith("https:") else "no TLS"]
    said = f"HTTP status {answer.status} to OPTIONS"
    if answer.status >= 500 and answer.status != 501:  # RFC 9110 15.6.2: it knows no OPTIONS
        return Finding("failed", subject, f"{said}; it would be sent outcomes again and again")
    if answer.status in (401, 403, 404, 410) or 300 <= answer.status < 400:
        return Finding("warning", subject, "; ".join([*words, f"{said}: is the URL right?"]))
    return Finding("ok", subject, "; ".join(words))
