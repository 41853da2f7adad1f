"""A user's mistake, told in one line."""

import difflib
from collections.abc import Iterable

_LONGEST = 4000  # characters of a message; what comes from files may be of any length

# The exit code that asks to be started again: sysexits.h, "the user is invited to retry".
EX_TEMPFAIL = 75


class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and what would be right.

    Command lines show it as one line with exit code 2; any other exception is a programmer's
    error and keeps its traceback. The names of files and classes in it may hold anything, so it is
    made `printable`.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text in one line that a terminal shows as it is.

    Line breaks, terminal codes and the like are written as in Python's literals; of a text that is
    far too long the middle is left out.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that `name` was probably meant to be, as a hint, or all valid names."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid are: {', '.join(valid)}"


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a name that is not among the `valid` ones."""
    return UserError(f"unknown {kind} {name!r}; {nearest(name, valid)}")
