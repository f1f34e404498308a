"""Delivery status notifications: their format, and the senders that get one."""
