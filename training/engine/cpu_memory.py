"""glibc's allocator on a CPU: freed memory is kept for the next step."""

import ctypes
import sys

# malloc.h; the values are ints
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, INT_MAX = -1, -2, -3, 2**31 - 1
TOP_PAD_BYTES = 1 << 28


def keep_freed_memory() -> bool:
    """Has the process' heap serve large tensors too, and grow in large steps; whether the C library knows how.

    By default glibc maps each tensor of over 32 MiB anew and gives it back, page by page, in every step: at batch 8
    that makes a step of ViT-S/14 take 1.5 times as long. The heap stays at its peak size until the process ends.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    settings = ((M_MMAP_THRESHOLD, INT_MAX), (M_TRIM_THRESHOLD, INT_MAX), (M_TOP_PAD, TOP_PAD_BYTES))
    return mallopt is not None and all(mallopt(*each) for each in settings)
