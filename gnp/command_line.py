"""What the command lines share: a parser and an end that tell a user's mistake in one line."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from etils import epath

from gnp import peers
from gnp.errors import UserError, unknown

_STORES = {"gs": "gcsfs", "s3": "s3fs"}  # and the package that etils reads each with


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s."""

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=f"python -m {program}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError` in place of printing the usage."""
        raise UserError(f"{message} (see {self.prog} --help)")


def overrides(arguments: Sequence[str], flags: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of field and text from ["--config.a.b=text", …], in order.

    Args:
      arguments: what is left of the command line.
      flags: the flags that it may have beside these, to be suggested for another.

    Raises:
      UserError: for anything else, and for a field without a value.
    """
    pairs = []
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if not flag.startswith("--config."):
            raise unknown("flag", flag, [*flags, "--help"])
        if not equals:
            raise UserError(f"{flag} has no value; write {flag}=VALUE")
        pairs.append((flag.removeprefix("--config."), text))
    return pairs


def directory(text: str) -> epath.Path:
    """The directory that a flag names, local or on an object store.

    Raises:
      UserError: if it is on one that cannot be reached from here.
    """
    scheme, separator, _ = text.partition("://")
    if separator and scheme not in _STORES:
        raise UserError(f"{text}: a directory is local, or as {' or '.join(_STORES)}://BUCKET/NAME")
    path = epath.Path(text)
    if separator:
        try:
            path.exists()
        except ImportError:
            raise UserError(
                f"{text} cannot be read without {_STORES[scheme]}; install it"
            ) from None
        except Exception as error:  # each store's client has its own
            raise UserError(f"{text} cannot be reached: {error!r}") from None
    return path


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command line's `main` and exits with its code, or with 2 on a `UserError`.

    Of several processes one that ends with an error does not wait for the others.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs traces of what it also raises
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        peers.leave(2, str(error))
        code = 2
    except BrokenPipeError:  # as in `… | head`
        peers.leave(1, "nobody reads its output any more")
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # a compilation that is under way does not survive an orderly exit
    sys.exit(code)
