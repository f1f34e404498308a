"""The status port: probes, metrics, and a page with live connections and recent traces."""
