"""The only importer of OpenTelemetry: observers that turn what happened into spans, events, metrics and logs."""
