"""The durable spool: mail that was answered 250 and has not left yet.

A message's way::

    session -> SpoolForwarder -> Draft -> Store.submit: durable -> 250
    Runner  <- Store.claim (the attempt is counted before any connection is made)
            -> Attempt: the upstream relay -> Store.finish: delivered, failed (with its bounce), or due again later

`messages` are the values, `store` is the interface of what keeps them, `embedded` the store in one directory. No other
module here knows which store it is: `forwarders` are what the session sees, `runner` begins `attempts`, `aging` ends
what is too old, `operators` is what people do with the queue, `schedule` decides when, and `dsn` makes bounces and
warnings.
"""
