"""`python -m otel_smtp` is `otel-smtp`."""

from otel_smtp.cli import main

main()
