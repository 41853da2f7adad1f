"""Files that a reader never sees half of, and directories that one process writes."""

import contextlib
import errno
import glob
import json
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterable, Iterator
from typing import IO

from etils import epath

from gnp.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

# What a file system answers that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on an object store, as gs://bucket/run."""
    return "://" in os.fspath(path)


def write_atomically(path: epath.Path | pathlib.Path, content: str | bytes) -> None:
    """Writes a file in one step: an interruption leaves the old file or the new one.

    Raises:
      OSError: if it cannot be written. Then the old file is there, if any, and nothing else.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        _put(path, data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(os.path.dirname(os.path.abspath(path)))


def remove_unfinished(directory: epath.Path | pathlib.Path, names: Iterable[str]) -> None:
    """Removes what `write_atomically` has left of these files where it was killed.

    For files that only this process writes now.
    """
    if is_remote(directory):
        return
    for name in names:
        for path in pathlib.Path(directory).glob(f".{glob.escape(name)}.*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()


def _put(path: epath.Path | pathlib.Path, data: bytes) -> None:
    """Writes an object, which is there whole or not at all."""
    try:
        path.write_bytes(data)
    except OSError:
        raise
    except Exception as error:  # each store's client has its own
        raise OSError(f"cannot write {path}: {error!r}") from error


def _sync_directory(directory: str) -> None:
    """Makes the names in a directory survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def lock(directory: epath.Path | pathlib.Path) -> Iterator[None]:
    """Holds a directory for this process; the lock ends with the process, however that ends.

    Where there are no locks (object stores, some network file systems) a warning says so.

    Raises:
      UserError: if another process holds it, or nothing can be written there.
    """
    if is_remote(directory) or fcntl is None:
        _warn_of_no_locks(directory)
        yield
        return
    with _open_lock(os.path.join(directory, ".lock")) as file:
        _held.add(file)
        try:
            _take(file, directory)
            yield
        finally:
            _held.discard(file)


def is_locked(directory: epath.Path | pathlib.Path) -> bool:
    """Whether a process holds a directory; False where there are no locks."""
    try:
        with open(os.path.join(directory, ".lock"), "rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no such lock, or none on this file system
        return False
    return False


def _take(file: IO[bytes], directory: epath.Path | pathlib.Path) -> None:
    try:
        _flock(file)
    except BlockingIOError:
        raise UserError(
            f"{_holder(file, directory)}; wait for its end, or choose another --workdir"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(f"cannot lock {directory}: {error.strerror}") from None
        _warn_of_no_locks(directory)
    else:
        _sign(file)


def _flock(file: IO[bytes]) -> None:
    """Takes a lock; another process may hold it for a moment, in `is_locked`."""
    for _ in range(5):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.01)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# The open lock files. A child that is forked has them too, and would keep the directories locked
# when this process is killed; one that is spawned, or started as a program, has none of them.
_held: set[IO[bytes]] = set()


def _let_go() -> None:
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _open_lock(path: str) -> IO[bytes]:
    try:
        return open(path, "a+b", buffering=0)  # not emptied: it says who holds it
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _sign(file: IO[bytes]) -> None:
    """Writes who holds the lock, which is only for people."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(json.dumps(holder).encode() + b"\n")


def _holder(file: IO[bytes], directory: epath.Path | pathlib.Path) -> str:
    """Who trains in a directory, and since when, as its lock file says."""
    try:
        file.seek(0)
        holder = json.loads(file.read())
        who = f"process {holder['process']} on {holder['host']}"
        return f"{who} has been training in {directory} since {holder['since']}"
    except (OSError, ValueError, LookupError, TypeError):  # not written, or being written
        return f"another process is training in {directory}"


def _warn_of_no_locks(directory: epath.Path | pathlib.Path) -> None:
    _log.warning("%s cannot be locked; start no second process that trains there", directory)
