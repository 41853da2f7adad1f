"""Fetching files from the web.

A file gets its name when it is whole and checked. Until then it is called NAME.part, and a program
that was interrupted goes on from there when it is run again.
"""

import contextlib
import hashlib
import re
import threading
from pathlib import Path
from typing import Any

from gnp.data.archives import Archive, progress_bar, told
from gnp.errors import UserError

_CONNECT_SECONDS, _READ_SECONDS = 8.0, 30.0  # of the latter: between two pieces


def fetch(archive: Archive, folder: Path) -> Path:
    """Downloads a file into a folder, unless it is there already.

    Until it is whole and checked it is called NAME.part, from which a later call goes on.

    Returns:
      Its path.

    Raises:
      UserError: if it cannot be had, or is not what it should be.
    """
    path = folder / archive.name
    if path.exists():
        check(path, archive)
        return path
    part = folder / f"{archive.name}.part"
    with told(f"write to {part}"):
        have = part.stat().st_size if part.exists() else 0
        if archive.size is not None and have > archive.size:  # of another file
            part.unlink()
            have = 0
        if not have or have != archive.size:
            _download(archive, part, have)
        if fault := _fault(part, archive):
            part.unlink()
            raise UserError(
                f"what {archive.url} sent is not {archive.name}, but {fault}, and was removed: run "
                f"this again, or put the file into {folder} by hand"
            )
        part.rename(path)
    return path


def _download(archive: Archive, part: Path, have: int) -> None:
    """Writes what is missing of a file behind the `have` bytes that are there, or all of it."""
    import requests
    import urllib3

    url = archive.url
    if not is_reachable(url):
        raise UserError(
            f"{archive.name} cannot be downloaded: no connection to {url}; fetch it where there is "
            f"one, put it into {part.parent} and run this again"
        )
    # Not compressed once more, so that all lengths are the file's own.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(
            url, headers=headers, stream=True, timeout=(_CONNECT_SECONDS, _READ_SECONDS)
        ) as response:
            start, total = _extent(response)
            if response.status_code == 416 or start not in (0, have):
                part.unlink(missing_ok=True)
                raise UserError(f"{url} does not go on from byte {have}: run this again, anew")
            if response.status_code not in (200, 206):
                raise UserError(
                    f"{archive.name} cannot be downloaded: {url} answers {response.status_code} "
                    f"{response.reason}; try again later, or put it into {part.parent} by hand"
                )
            if total is not None and archive.size is not None and total != archive.size:
                raise UserError(
                    f"{url} has {total:,} bytes, but {archive.name} {archive.size:,}: put the "
                    f"genuine file into {part.parent} by hand"
                )
            have = start  # 0 if the server knows no ranges
            total = total or archive.size
            with (
                open(part, "ab" if start else "wb") as file,
                progress_bar(archive.name, total, have) as bar,
            ):
                for piece in response.iter_content(1 << 14):
                    file.write(piece)
                    have += len(piece)
                    bar.update(len(piece))
                    if total is not None and have > total:
                        break  # and the check will say so
        if total is None or have >= total:
            return
    except (requests.RequestException, urllib3.exceptions.HTTPError):
        pass  # as below, where it stops without an error
    have = part.stat().st_size if part.exists() else 0
    total_text = "" if archive.size is None else f" of {archive.size:,}"
    raise UserError(
        f"the connection to {url} broke off after {have:,}{total_text} bytes: run this again "
        "to go on from there"
    )


def _extent(response: Any) -> tuple[int, int | None]:
    """The byte that an answer begins with, and how many the whole file has, if that is said."""
    if response.status_code == 206:
        said = re.fullmatch(
            r"bytes (\d{1,15})-\d+/(\d{1,15}|\*)", response.headers.get("Content-Range", "")
        )
        if not said:
            return -1, None
        return int(said[1]), None if said[2] == "*" else int(said[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if re.fullmatch(r"\d{1,15}", length) else None


def check(path: Path, archive: Archive) -> None:
    """Raises `UserError` if a file is not of the size and content that it should be."""
    with told(f"read {path}"):
        fault = _fault(path, archive)
    if fault:
        raise UserError(
            f"{path} is not the genuine file, but {fault}: remove it, fetch it from {archive.url} "
            "and run this again"
        )


def _fault(path: Path, archive: Archive) -> str:
    """What is wrong with a file's size or content; empty if nothing is."""
    size = path.stat().st_size
    if archive.size is not None and size != archive.size:
        return f"has {size:,} bytes in place of {archive.size:,}"
    if archive.md5 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        if digest.hexdigest() != archive.md5:
            return f"has the MD5 sum {digest.hexdigest()}"
    return ""


def is_reachable(url: str, seconds: float = _CONNECT_SECONDS) -> bool:
    """Whether a web server answers at all in that time. TFDS itself would try for minutes."""
    import requests

    answered = threading.Event()

    def probe() -> None:
        with contextlib.suppress(requests.RequestException):
            requests.head(url, timeout=seconds)
            answered.set()

    # In a thread, since looking up the host's name heeds no time limit.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
