"""Keep freed memory in the process, which spares a CPU the page faults of every step anew."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def keep_pages() -> bool:
    """Let glibc's malloc reuse large blocks instead of returning them to the system.

    A step over N networks allocates and frees hundreds of MB of activations; by default each block
    is mapped and faulted in anew. Affects the whole process, which keeps its peak memory until it
    ends, so no function here calls it by itself.

    Returns:
        Whether it took effect; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
