"""Delivery status notifications: their format, and who is sent one."""
