"""How much memory there is, and what to do where it runs out."""

from __future__ import annotations

import gc
import os
import warnings

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of this machine, caches of the system counted as free."""
    if device.type == "cuda":
        # What torch keeps for the next tensors is taken, as the driver sees it, and free for them.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):  # not every platform tells
        return 1 << 31


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    # The last one: cuDNN's and cuBLAS's CUDNN_STATUS_ALLOC_FAILED, for what they need beside the tensors.
    signs = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
    return any(sign in text for sign in signs)


def lowered(size: int, device: torch.device, what: str, stacklevel: int = 3) -> int:
    """Half the batch size, after memory ran out. Says so with a RuntimeWarning and returns what was kept for reuse.

    To be called outside of the handler: the traceback that it holds keeps the failed batch's tensors alive.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    warnings.warn(
        f"out of memory with {size} images at a time at {what}: starting again with {size // 2}",
        RuntimeWarning,
        stacklevel=stacklevel + 1,
    )
    return size // 2
