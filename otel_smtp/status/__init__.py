"""The status side: probes, metrics, and a page that shows live connections and recent traces."""
