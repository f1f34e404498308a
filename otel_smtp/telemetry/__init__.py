"""The only importer of OpenTelemetry: observers that make spans, events, metrics and logs from records."""
