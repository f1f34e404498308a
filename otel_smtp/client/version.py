"""The version of this package, for its distribution and its tracer."""

__version__ = "0.1.0"
