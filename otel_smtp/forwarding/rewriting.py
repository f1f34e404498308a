"""A forwarder in front of another one that replaces every envelope sender by the one that the provider accepts.

Providers that bind a login to one address refuse every other reverse-path, and the applications behind a relay have
many. The content is not touched, so its From field still names the author (RFC 5322 3.6.2), and DKIM signatures
survive. The null reverse-path stays as it is: it marks a notice, and an address in its place would let notices be
answered by notices (RFC 5321 4.5.5).
"""

from otel_smtp.forwarding.base import Forwarder, MailTransaction
from otel_smtp.observing import TransactionRecord
from otel_smtp.smtp.envelope import Mail
from otel_smtp.smtp.extensions import Extensions


class SenderRewritingForwarder:
    """Passes mail on with another reverse-path, which then decides routes, bounces and the upstream's view.

    Args:
        behind: the forwarder that takes the mail.
        sender: the mailbox that replaces every reverse-path, ASCII.
    """

    def __init__(self, behind: Forwarder, sender: str) -> None:
        self._behind = behind
        self._sender = sender

    def capabilities(self) -> Extensions:
        """Those of the forwarder behind."""
        return self._behind.capabilities()

    def begin(self, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """Open a transaction; errors as those of the forwarder behind."""
        if mail.reverse_path:
            mail = mail._replace(reverse_path=self._sender)
        return self._behind.begin(mail, record)
