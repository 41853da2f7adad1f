"""What the command lines share: a parser and an end that tell a user's mistake in one line."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from etils import epath
from ml_collections import ConfigDict

from gnp import peers
from gnp.config import from_json
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
        self._arguments: Sequence[str] | None = None

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError` in place of printing the usage."""
        if "are required" in message or "unrecognized" in message:  # a flag may be mistyped
            arguments = sys.argv[1:] if self._arguments is None else self._arguments
            for flag in (argument.partition("=")[0] for argument in arguments):
                is_flag = flag.startswith("--") and not flag.startswith("--config.")
                if is_flag and flag not in self._option_string_actions:
                    raise self._unknown(flag)
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_with_fields(
        self, arguments: Sequence[str] | None = None
    ) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
        """Parses a command line that may set fields, as --config.a.b=text.

        Args:
          arguments: by default the program's.

        Returns:
          The flags, and pairs of field and text, in order.

        Raises:
          UserError: for any other flag, and for a field without a value.
        """
        self._arguments = arguments
        flags, rest = self.parse_known_args(arguments)
        pairs = []
        for argument in rest:
            flag, equals, text = argument.partition("=")
            if not flag.startswith("--config."):
                raise self._unknown(flag)
            if not equals:
                raise UserError(f"{flag} has no value; write {flag}=VALUE")
            pairs.append((flag.removeprefix("--config."), text))
        return flags, pairs

    def _unknown(self, flag: str) -> UserError:
        return unknown("flag", flag, [x for x in self._option_string_actions if x != "-h"])


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


def config_of(workdir: epath.Path) -> ConfigDict:
    """The configuration of a run, which its checkpoints tell where the file is lost.

    Raises:
      UserError: if the directory is not that of a run.
    """
    path = workdir / "config.json"
    if not path.is_file() and (workdir / "checkpoints").is_dir():
        from gnp.training.recovery import recover  # here, since JAX is slow to import

        recover(workdir)
    if not path.is_file():
        raise UserError(f"{workdir} is not a work directory: it has no config.json")
    return from_json(path.read_text(), where=str(path))


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
