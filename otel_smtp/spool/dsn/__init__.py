"""Delivery status notifications: their format, and when to send one."""
