"""How the C library's allocator treats memory that is freed."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Has glibc, where there is one, keep what is freed in place of returning it to the system.

    A step's or a batch's arrays are freed and wanted again at once, and fresh pages cost the system
    a good part of a small step. To be called before the first threads start.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # as malloc.h numbers them
        for option, value in ((trim_threshold, 2**31 - 1), (mmap_max, 0), (arena_max, 1)):
            mallopt(option, value)
