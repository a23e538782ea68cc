"""Makes a log's values safe to show: without passwords, without control characters, and bounded.

A log line is untrusted: it may hold a URL with its password, a terminal's escape sequences, or a
megabyte in one field. Every value that is kept of a log passes through here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping

from pidpool.tools.logs import event_fields

LONGEST = 300
"""Characters that are kept of a value; a path with its function is shorter."""

LONGEST_FORK_LINE = 4 * LONGEST
"""Of the line that forked, with its callers."""

MOST_OWN_FIELDS = 6
"""How many of the user's own fields are kept of one event."""

_LOOKED_AT = 2000

# As SQLAlchemy reads a URL: a password is everything up to the "@", spaces and quotes included. Text up
# to a further "@" may be the rest of a password that was not encoded.
_IN_URL = re.compile(r"(://[^:/@\s]*):[^@]*@(?:[^\s/@]*@)*")
_IN_URL_CUT_OFF = re.compile(r"(://[^:/@\s]*):[^@]*$")
_IN_DSN = re.compile(r"(?i)(passw(?:or)?d|pwd)(\s*=\s*)('[^']*'?|\"[^\"]*\"?|[^\s&;]+)")
_SECRET_NAME = re.compile(r"(?i)passw|pwd|secret|token|api_?key|authori[sz]ation|cookie")

_NOT_THE_USERS = event_fields.EVERY_LINE | event_fields.PIDPOOL


@functools.lru_cache(maxsize=1024)
def clean(text: str, longest: int = LONGEST) -> str:
    """Return the text with passwords masked and unprintable characters escaped, cut to `longest`."""
    cut_off = len(text) > _LOOKED_AT
    text = _IN_URL.sub(r"\1:***@", text[:_LOOKED_AT])
    if cut_off:
        text = _IN_URL_CUT_OFF.sub(r"\1:***", text)
    text = _IN_DSN.sub(r"\1\2***", text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= longest and not cut_off else text[: longest - 1] + "…"


def cleaned(value: object, longest: int = LONGEST) -> str | None:
    """Return a field's value as text that is safe to show; None for None."""
    if value is None:
        return None
    try:
        return clean(value if isinstance(value, str) else json.dumps(value), longest)
    except RecursionError:
        return "…"  # nested a thousand times


def own_fields(event: Mapping[str, object]) -> dict[str, str]:
    """Return the fields that the user's own configuration added to an event, such as a request's id."""
    found: dict[str, str] = {}
    for name, value in event.items():
        if name in _NOT_THE_USERS or value is None:
            continue
        if len(found) == MOST_OWN_FIELDS:
            break
        found[clean(name, 40)] = "***" if _SECRET_NAME.search(name) else cleaned(value) or ""
    return found
