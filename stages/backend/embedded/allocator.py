"""The C library's allocator, told to keep what ops free."""

import ctypes
import functools
import platform

# From glibc's malloc.h; mallopt(3) says what they mean.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

MMAP_FROM = 32 << 20
"""Bytes from which an allocation gets pages of its own: the largest value that glibc takes."""

KEPT_FREE = 512 << 20
"""Free bytes at the end of the heap that stay with the process."""


@functools.cache
def keep_freed_memory() -> bool:
    """Stops glibc from returning the memory of every large temporary tensor to the kernel, once for the process.

    Else each op of a prefill, and attention in a decode, takes a page fault for every 4 KiB it writes, which costs
    more than the writing. Returns False under another C library, which is left as it is.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, MMAP_FROM)) and bool(libc.mallopt(M_TRIM_THRESHOLD, KEPT_FREE))
