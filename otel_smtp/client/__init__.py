"""For applications that send mail through the gateway: their trace travels with the message.

`inject` gives a message the current span by hand; `SmtplibInstrumentor` and `AiosmtplibInstrumentor`, in
`smtplib_instrumentor` and `aiosmtplib_instrumentor`, do it without a line of code, and give each message a span of its
own. ``inject`` needs ``opentelemetry-api`` alone, the instrumentors also ``opentelemetry-instrumentation``; nothing of
the gateway is imported.

The package is installed under two names: `otel_smtp.client` with the gateway, and `otel_smtp_client`, which the small
distribution ``otel-smtp-client`` owns. The files are the same, so they import each other by relative names.
"""

from .trace_headers import inject
from .version import __version__

__all__ = ["__version__", "inject"]
