"""A real gateway and a mailbox behind it, for applications' own tests.

With pytest there is nothing to import: the fixtures `smtp_gateway` and `mailbox` come with the package. Without it::

    from otel_smtp.testing import run_gateway

    with run_gateway() as gateway:
        send_receipt(gateway.host, gateway.port)
        (receipt,) = gateway.mailbox["bob@there.example"]
        assert gateway.trace_of(receipt).outcome == "relayed"

The gateway runs in a thread of its own, so tests may be synchronous or not; it listens on a port that the kernel
chooses, so they may run in parallel. `mailbox` is its upstream, an SMTP server in memory that misbehaves on demand.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otel_smtp.testing.mailbox import Mailbox, ReceivedMail
    from otel_smtp.testing.running_gateway import RunningGateway, run_gateway
    from otel_smtp.testing.traces import Event, Span, Trace

__all__ = ["Event", "Mailbox", "ReceivedMail", "RunningGateway", "Span", "Trace", "run_gateway"]


def __getattr__(name: str) -> Any:
    """Import heavy modules at first use: pytest loads this package in every run."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from otel_smtp.testing import mailbox, running_gateway, traces

    return next(vars(home)[name] for home in (running_gateway, mailbox, traces) if name in vars(home))
