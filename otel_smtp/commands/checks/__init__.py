"""What `check --connect` tries: one module per thing, none of which sends mail.

Each check takes a bounded time and ends in findings, never in an exception: a fault in one place must not hide another.
"""
