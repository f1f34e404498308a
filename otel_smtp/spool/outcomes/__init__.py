"""Outcomes: the fate of each recipient of queued mail, POSTed to the application as signed CloudEvents.

    events     what an outcome says, and its signature: values in, octets out
    recording  which ends are reported to which receivers; each is stored in the same commit as the end that it reports
    posting    one exchange with a receiver, within its bounds
    receivers  the receivers, and how each fares
    sending    claims what is due, posts it, and backs off from a receiver that fails
    telling    all of it as one thing, which the spool has where there are receivers

In the store an outcome is a message of its own kind, with a destination that no mail has. So it is as durable as the
mail, is leased, taken over and retried like it, and ends by the same verbs.
"""
