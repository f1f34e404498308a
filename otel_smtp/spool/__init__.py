"""The durable spool: mail that was accepted with 250 and has not left yet.

The path of a message::

    session -> SpoolForwarder -> Intake: Draft -> Store.submit: durable -> 250
    Runner  <- Store.claim (the attempt is counted before any connection is made)
            -> Attempt: the upstream relay -> Store.finish: delivered, failed (with its bounce), or due again later

`messages` are the values, `store` is the interface of the stores, `embedded` the store in one directory, `postgresql`
the one in a database. No other module here knows which store it uses: `forwarders` is the session's side, `intake`
makes messages durable, `runner` begins `attempts`, `aging` expires old mail, `operators` runs people's commands on the
queue, `schedule` decides when to retry, `dsn` makes bounces and warnings, and `outcomes` reports to the application.
"""
