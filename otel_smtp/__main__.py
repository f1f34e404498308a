"""`otel-smtp`, also as `python -m otel_smtp`."""


def main() -> None:
    """The entry point. It imports the commands itself, so that Ctrl-C ends that too without a traceback."""
    try:
        from otel_smtp.commands.cli import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
