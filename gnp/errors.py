"""A user's mistake, told in one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: the message says what is wrong, where, and what would be right.

    Command lines show it as one line with exit code 2; any other exception is a programmer's
    error and keeps its traceback.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that `name` was probably meant to be, as a hint, or all valid names."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid are: {', '.join(valid)}"


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a name that is not among the `valid` ones."""
    return UserError(f"unknown {kind} {name!r}; {nearest(name, valid)}")
