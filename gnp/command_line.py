"""What the command lines share: a parser and an end that tell a user's mistake in one line."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from gnp.errors import UserError


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


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command line's `main` and exits with its code, or with 2 on a `UserError`."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # as in `… | head`
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # a compilation that is under way does not survive an orderly exit
    sys.exit(code)
