"""`otel-smtp queue`: operators look at the spool and change it, with a gateway running or not.

`messages` has the commands for any queue, `shared` those for a queue that several gateways share. `asking` sends their
requests to the owner of the queue.
"""

from typing import Final

import click

from otel_smtp.commands.options import global_flags
from otel_smtp.commands.queue import messages, shared
from otel_smtp.commands.queue.asking import ask_queue

__all__: Final = ("ask_queue", "queue")


@click.group()
@global_flags(takes_json=False)
def queue() -> None:
    """Show queued mail and act on it.

    It makes no difference whether a gateway runs.

    ID... are queue ids; - reads them from standard input, one per line.
    """


for command in (
    messages.list_, messages.find, messages.shape, messages.show, *messages.changing, messages.delete, messages.export,
    messages.rebuild, messages.counts, shared.gateways, shared.limits, shared.move, shared.migrate,
):  # fmt: skip
    queue.add_command(command)
