"""What Django's backend tells an application: `python django_send.py PORT RECIPIENT...` sends one mail to them."""

import sys

import django
from django.conf import settings
from django.core.mail import EmailMessage
from django.core.mail.backends.smtp import EmailBackend

if __name__ == "__main__":
    port, *recipients = sys.argv[1:]
    settings.configure()
    django.setup()
    message = EmailMessage("Hello", "Hello\n", "a@client.example", recipients)
    with EmailBackend(host="127.0.0.1", port=int(port)) as backend:
        print(f"sent {backend.send_messages([message])}")
