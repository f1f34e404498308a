"""otel_smtp: an OpenTelemetry-traced SMTP gateway."""

__version__ = "0.1.0"
