"""SASL: the mechanisms that telemetry may name."""

from typing import Final

MECHANISMS: Final = ("PLAIN", "LOGIN", "SCRAM-SHA-256", "XOAUTH2", "OAUTHBEARER")
"""Every mechanism that this gateway knows; anything else a client names is "other"."""
