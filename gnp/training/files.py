"""Writing files so that a reader never sees half of one."""

import os
import pathlib


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a text file in one step: an interruption leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
