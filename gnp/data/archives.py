"""Archives that data sets come in, and unpacking them.

An archive may be damaged or hostile: nothing is written outside the folder it is unpacked to, and
no link or device is made. What is written gets its name when it is whole, so that an interrupted
program may be run again. Errors of the archive and of the disk become `UserError`s.
"""

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from gnp.data.records import first_line
from gnp.errors import UserError

# What their readers raise at bytes that are not as they should be.
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError, ValueError),
    *(NotImplementedError, RuntimeError),  # compressed or encrypted as no genuine file is
    *(MemoryError, OverflowError),  # of sizes that are none
)


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file that a data set comes in.

    Attributes:
      name: of the file.
      url: where it is downloaded from, or the page on which a person gets it.
      size: bytes; None if it is not checked.
      md5: of its content, in hex; None if that takes too long to check.
    """

    name: str
    url: str
    size: int | None
    md5: str | None


# --- Unpacking ----------------------------------------------------------------------------------


def unpack_zip(path: Path, target: Path, *, max_bytes: int = 4 * 10**9) -> None:
    """Unpacks a zip archive that has all in one folder, which becomes `target`.

    Raises:
      UserError: if it is damaged, or would write more than `max_bytes` or outside that folder, or
        if the files cannot be written.
    """
    with told(f"unpack {path} to {target}"), readable(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        parts = [_safe_parts(path, member.filename) for member in members]
        for member, inside in zip(members, parts, strict=True):
            # The upper half of the attributes is Unix's mode, 0 where the archiver knew none.
            kind = stat.S_IFMT(member.external_attr >> 16)
            if inside[0] != target.name or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise unsafe(path, member.filename)
            # Others can unpack a few bytes to gigabytes at once.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise unsafe(path, member.filename)
        total = sum(member.file_size for member in members)
        if total > max_bytes:
            raise UserError(
                f"{path} would unpack to {in_bytes(total)}, far more than it should: it is not "
                "the genuine file, so remove it"
            )
        with whole(target) as temporary, progress_bar(f"unpacking {path.name}", total) as bar:
            for folder in {inside[1:-1] for inside in parts}:
                temporary.joinpath(*folder).mkdir(parents=True, exist_ok=True)
            for member, inside in zip(members, parts, strict=True):
                file = temporary.joinpath(*inside[1:])
                if member.is_dir():
                    file.mkdir(exist_ok=True)
                    continue
                with archive.open(member) as source, file.open("xb") as sink:
                    shutil.copyfileobj(source, sink)
                bar.update(member.file_size)


def unpack_flat(file: IO[bytes], path: Path, folder: Path, bar: tqdm | None = None) -> None:
    """Unpacks a tar archive without folders, which is `path` or inside it."""
    count = 0
    for name, source in tar_files(file, path, bar):
        parts = _safe_parts(path, name)
        if len(parts) != 1:
            raise unsafe(path, name)
        with (folder / parts[0]).open("xb") as sink:
            shutil.copyfileobj(source, sink)
        count += 1
    if not count:
        raise tarfile.ReadError("an archive without images")


def tar_files(
    file: IO[bytes], path: Path, bar: tqdm | None = None
) -> Iterator[tuple[str, IO[bytes]]]:
    """The names and contents of what a tar archive holds, which is `path` or inside it.

    Raises:
      UserError: if it holds anything but files.
      tarfile.TarError: if it is damaged.
    """
    end = -1
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if archive.offset <= end:  # a size below 0, and `tarfile` would go round for ever
                raise tarfile.ReadError(f"{member.name!r} has no size")
            end = archive.offset
            if member.isdir() and not PurePosixPath(member.name).parts:  # "./"
                continue
            # No link or device, and none whose bytes are not all in the archive.
            plain = member.isreg() and not member.issparse()
            source = archive.extractfile(member) if plain else None
            if source is None:
                raise unsafe(path, member.name)
            with source:
                yield member.name, source
            if bar is not None:
                bar.update(member.offset_data + member.size - bar.n)
        # `tarfile` ends at what is broken too, so see that it has ended at zeros.
        file.seek(archive.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"no header of a file at byte {archive.offset:,}")


def _safe_parts(path: Path, name: str) -> tuple[str, ...]:
    """The parts of a path in the archive `path`, if it stays in the folder it is unpacked to."""
    parts = PurePosixPath(name).parts
    safe = parts and ".." not in parts and not name.startswith("/")
    if not safe or re.search(r"[\\:]", name) or not name.isprintable():
        raise unsafe(path, name)
    return parts


def unsafe(path: Path, name: str) -> UserError:
    """The error for an archive with something in it that does not belong there."""
    return UserError(
        f"{path} holds {name!r}, which the genuine file does not: nothing of it is used; remove it"
    )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the errors of an archive that is damaged into a `UserError`."""
    try:
        yield
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged: {first_line(error)}; fetch it again") from error


# --- Folders ------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A new folder to write to, which becomes `target` at the end if nothing is raised.

    What an interrupted process left is removed first.
    """
    temporary = target.with_name(f".{target.name}.part")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(target)
    except Exception:  # an interruption does not wait for it
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process from writing to the same files. The lock dies with its process."""
    with told(f"read {folder}"):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is preparing data in {folder}: wait until it has ended"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def told(doing: str) -> Iterator[None]:
    """Turns an error of the disk into a `UserError`."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"cannot {doing}: {error.strerror or first_line(error)}{where}; run this again when "
            "that is mended"
        ) from error


# --- Sizes --------------------------------------------------------------------------------------


def progress_bar(title: str, total: int | None, done: int = 0) -> tqdm:
    """A progress bar in bytes on stderr, if that is a terminal."""
    return tqdm(
        desc=title,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        disable=None,
        file=sys.stderr,
        dynamic_ncols=True,
    )


def host_memory() -> int:
    """Bytes of memory that this machine has, or that a container may have of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def in_bytes(size: int) -> str:
    """A size for people: 248.1 MB."""
    number, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.1f} {unit}" if unit != "bytes" else f"{size} bytes"
