"""The error that is meant for the person at the keyboard, and what its message is made with."""

import difflib
import re
from collections.abc import Iterable

_IN_AUTHORITY = re.compile(r"""://(?:[^\s/"']*|[^\s/:@"']*:[^\s@"]*)@""")  # a password may hold a slash, or a quote
_SECRETS = "user|username|[\\w-]*(?:password|passwd|token|secret|key|keyid|signature|credential)|pwd|auth|sig"
_IN_QUERY = re.compile(rf"""(?<=[?&])((?:{_SECRETS})=)[^\s&"']+""", re.IGNORECASE)


class UserError(Exception):
    """What was wrong, where, and what to do, in one message. The CLI prints it and exits with status 1.

    User names and passwords of URIs in it are masked.
    """

    def __init__(self, message: str) -> None:
        super().__init__(mask_credentials(message))


def nearest(name: str, known: Iterable[str], above: str = "") -> str:
    """ " (did you mean 'X'?)" with the known name that is most like `name`, written behind `above`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{above}{close[0]}'?)" if close else ""


def first_line(error: Exception) -> str:
    """The first line of what an error says, 300 characters at most, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def one_line(error: Exception) -> str:
    """All that an error says, in one line, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def mask_credentials(text: str) -> str:
    """The text with `***` for user names and passwords of the URIs in it."""
    return _IN_QUERY.sub(r"\1***", _IN_AUTHORITY.sub("://***@", text))
