"""The durable spool: mail that was answered 250 and has not left yet.

A message's way::

    client -> SpoolForwarder -> Draft (memory, or a file in tmp/)
                             -> Store.submit: content synced, renamed, directory synced, index committed -> 250
    Runner <- Store.lease (the attempt is counted before any connection is made)
           -> the upstream relay -> Store.finish: delivered, failed (with its bounce), or due again later

`files` is the directory, `index` the SQLite database in it, `store` the one thread that owns both and commits in
groups. `forwarder` is what the server sees, `runner` what empties the spool, `control` what operators do with it.
`schedule` and `bounce` decide when and what, without doing anything.
"""
