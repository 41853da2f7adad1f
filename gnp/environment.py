"""What a command line sets in its process before JAX starts."""

import os
import pathlib

from gnp.memory import keep_freed_memory


def set_up() -> None:
    """Has memory kept that a step frees, and compiled programs kept for the next start.

    Programs lie in `$XDG_CACHE_HOME/gnp/xla` (by default `~/.cache/gnp/xla`), which may be deleted
    at any time. JAX's own environment variables stand above these.
    """
    keep_freed_memory()
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(home, "gnp", "xla")))
    # Small programs too: a start compiles dozens, and what is read costs nothing beside it.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
