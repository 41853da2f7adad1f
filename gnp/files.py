"""Files that a reader never sees half of, and directories that one process writes."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from gnp.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a text file in one step: an interruption leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def lock(directory: pathlib.Path) -> Iterator[None]:
    """Holds a directory for this process; the lock ends with the process, however that ends.

    Raises:
      UserError: if another process holds it.
    """
    with (directory / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is training in {directory}; wait for its end, or choose "
                    "another --workdir"
                ) from None
        yield
