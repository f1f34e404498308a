"""Outcomes: the fate of each recipient of queued mail, POSTed to the application as signed CloudEvents.

    events     the event of an outcome, and its signature: values in, octets out
    recording  makes the outcomes of ends, each stored in the same commit as its end
    posting    one exchange with a receiver, within its bounds
    receivers  the receivers, with the health and backlog of each
    sending    claims due outcomes, posts them, and backs off from failing receivers
    reporting  making and sending outcomes as one thing, for a spool with receivers

In the store an outcome is a message of its own kind, with a destination that no mail has. So it is as durable as the
mail, is leased, taken over and retried like it, and ends by the same verbs.
"""
