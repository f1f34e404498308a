"""Messages that mail systems have broken before."""

import random
from email.message import EmailMessage
from email.policy import SMTP
from typing import Final

MIB: Final = 1024 * 1024


def with_attachments(octets: int) -> bytes:
    """A multipart message of text, HTML and a binary attachment of `octets` octets, as an application builds it."""
    message = EmailMessage(policy=SMTP)
    message["From"] = "a@client.example"
    message["To"] = "b@there.example"
    message["Subject"] = "Report, with attachment"
    message["Date"] = "Thu, 01 Jan 2026 00:00:00 +0000"
    message["Message-ID"] = "<report@client.example>"
    message.set_content("See the attachment.\n")
    message.add_alternative("<p>See the attachment.</p>\n", subtype="html")
    data = random.Random(octets).randbytes(octets)
    message.add_attachment(data, maintype="application", subtype="octet-stream", filename="report.bin")
    return message.as_bytes()


HEADER: Final = (
    b"From: a@client.example\r\nTo: b@there.example\r\nDate: Thu, 01 Jan 2026 00:00:00 +0000\r\n"
    b"Message-ID: <x@client.example>\r\n"
)
EIGHT_BIT: Final = (
    HEADER
    + (
        b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Content-Transfer-Encoding: 8bit\r\n\r\n"
    )
    + "Grüße aus Köln, 日本語, \u00a0\u2028 and \U0001f4e8\r\n".encode()
)
DOTS: Final = HEADER + b"Subject: dots\r\n\r\n" + b".\r\n..\r\n...three\r\n.a\r\na.\r\n \r\n\r\n.\r\n..\r\n"
MESSAGES: Final = {"8-bit": EIGHT_BIT, "dots": DOTS, "5 MiB": with_attachments(5 * MIB * 3 // 4)}
