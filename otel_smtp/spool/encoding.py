"""The JSON form of a message's parts, the same in all stores."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.spool.messages import SpooledRecipient

_NO_PARAMETERS: Final = Mail("")[1:]


def parameters_of(mail: Mail) -> dict[str, object]:
    """The given parameters of MAIL."""
    if mail[1:] == _NO_PARAMETERS:
        return {}
    given = {
        "size": mail.size,
        "body": mail.body,
        "smtputf8": mail.smtputf8 or None,
        "ret": mail.ret,
        "envid": mail.envid,
        "require_tls": mail.require_tls or None,
        "auth": mail.auth,
    }
    return {name: value for name, value in given.items() if value is not None}


def mail_of(reverse_path: str, parameters: Mapping[str, Any] | None) -> Mail:
    """The inverse of `parameters_of`."""
    if not parameters:
        return Mail(reverse_path)
    given = dict(parameters)
    body, ret = given.pop("body", None), given.pop("ret", None)
    return Mail(reverse_path, body=body and Body(body), ret=ret and DsnReturn(ret), **given)


def recipient_of(values: Sequence[Any]) -> SpooledRecipient:
    """Make a recipient that has not ended from number, address, NOTIFY, ORCPT and last reply."""
    number, address, notify, orcpt, last_reply = values
    return SpooledRecipient(number, Recipient(address, None if notify is None else Notify(notify), orcpt), last_reply)
