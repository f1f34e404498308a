"""For applications that send mail through the gateway: their trace goes with the message.

Needs only ``opentelemetry-api``; nothing of the gateway itself is imported.
"""

from otel_smtp.telemetry.client import inject

__all__ = ["inject"]
