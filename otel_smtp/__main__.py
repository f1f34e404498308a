"""`python -m otel_smtp` is `otel-smtp`."""

from otel_smtp.commands.cli import main

main()
