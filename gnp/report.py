"""Writes reports: `python -m gnp.report DIR` leaves DIR/report.html, the report of one run.

`python -m gnp.report DIR… --out=report/` compares runs: report/index.html, with the tables and
figures of both papers, each also as files of its own.
"""

import logging
import os
from collections.abc import Sequence

from etils import epath

from gnp import command_line
from gnp.analysis import measures, run_page, runs
from gnp.errors import UserError
from gnp.files import write_atomically

_log = logging.getLogger(__name__)


def write(workdir: str | os.PathLike[str], command: str | None = None) -> epath.Path:
    """Writes the report of a run into its work directory.

    The same work directory and command give the same bytes.

    Args:
      workdir: the work directory; the run may have ended or not.
      command: the command line that made the run; by default the one in the run's result.

    Returns:
      The file that was written.

    Raises:
      UserError: if the directory does not hold a run, or cannot be written to.
    """
    run = runs.load(workdir)
    noted = (run.result or {}).get("command")
    command = command or (noted if isinstance(noted, str) else None)
    path = run.workdir / "report.html"
    page = run_page.page(run, command)
    try:
        # Half a surrogate pair, as in a file name that is not UTF-8, has no encoding.
        write_atomically(path, page.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def write_comparison(
    directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> epath.Path:
    """Writes the report of many runs; one that cannot be read is named in it, and in a warning.

    It has `index.html`, `runs.csv` (a row a run, see `gnp.analysis.comparison.frame`),
    `interactive.html`, `tables/NAME.{html,md,tex,csv}` and `figures/NAME.{svg,pdf,png}`. The same
    runs give the same bytes.

    Args:
      directories: work directories, and folders that hold some at any depth, as a sweep.
      out: the folder for the report; files of an older one are replaced, or removed.

    Returns:
      The page, `out`/index.html.

    Raises:
      UserError: if there are no runs that can be read, or `out` cannot be written.
    """
    from gnp.analysis.comparison import find
    from gnp.analysis.comparison_page import write as write_pages  # what it loads takes a second

    damaged: list[str] = []
    found = find(directories, damaged)
    for run in found:
        try:
            measures.current(run.workdir)
        except UserError as error:  # figures leave it out
            damaged.append(str(error))
    for problem in damaged:
        _log.warning("left out: %s", problem)
    return write_pages(found, epath.Path(out), damaged)


def main() -> int:
    """Parses the directories and writes their reports."""
    parser = command_line.Parser(
        "gnp.report",
        "Writes the report of a run, DIR/report.html; or, with --out or a folder of runs, of many.",
    )
    directory = command_line.directory
    parser.add_argument(
        "directories",
        metavar="DIR",
        nargs="+",
        type=directory,
        help="the work directory of a run, or a folder that holds some, as a sweep",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=directory,
        help="where the report of many runs goes; by default report/, in the folder of runs "
        "where it is one, otherwise here",
    )
    flags = parser.parse_args()
    first, *others = flags.directories
    if flags.out is None and not others and _is_one_run(first):
        print(write(first))
    else:
        out = flags.out or (epath.Path("report") if others else first / "report")
        print(write_comparison(flags.directories, out))
    return 0


def _is_one_run(directory: epath.Path) -> bool:
    """Whether it is not a folder of runs; what is nothing of the two is told as a run is."""
    return not directory.is_dir() or runs.is_workdir(directory)


if __name__ == "__main__":
    command_line.run(main)
