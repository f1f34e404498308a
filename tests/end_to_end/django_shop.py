"""A small Django application, settings and views in one module, that mails a receipt; it knows nothing of tracing.

    DJANGO_SETTINGS_MODULE=django_shop EMAIL_PORT=2525 opentelemetry-instrument python django_shop.py

It prints its port and serves until its standard input ends.
"""

import os
import sys
import threading
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import django
from django.core.mail import send_mail
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

SECRET_KEY = "of a test"
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "django_shop"
if django.VERSION >= (6, 1):
    MAILERS = {
        "default": {
            "BACKEND": "django.core.mail.backends.smtp.EmailBackend",
            "OPTIONS": {"host": "127.0.0.1", "port": int(os.environ["EMAIL_PORT"])},
        }
    }
else:
    EMAIL_HOST = "127.0.0.1"
    EMAIL_PORT = int(os.environ["EMAIL_PORT"])
USE_TZ = True


def order(request: HttpRequest, customer: str) -> HttpResponse:
    """Take an order and mail the receipt."""
    send_mail("Your receipt", "Thank you.\n", "shop@shop.example", [customer])
    return HttpResponse("ordered")


urlpatterns = [path("order/<customer>", order)]


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    with make_server("127.0.0.1", 0, get_wsgi_application(), handler_class=_Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_port, flush=True)
        sys.stdin.read()
        server.shutdown()
