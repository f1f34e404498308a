"""OAUTHBEARER's message as clients send it: the gateway only reads it."""


def oauthbearer(name: str, token: str, *, host: str = "gw.example.com", port: int = 587) -> bytes:
    """A GS2 header, ^A, pairs each with ^A, ^A (RFC 7628 3.1)."""
    escaped = name.replace("=", "=3D").replace(",", "=2C")
    return f"n,a={escaped},\x01host={host}\x01port={port}\x01auth=Bearer {token}\x01\x01".encode()
