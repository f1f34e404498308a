"""The durable spool: accepted mail on disk before 250, delivered later, bounced where it fails for good."""
