"""This process on its machine: how XLA on a CPU is made faster there, and what memory it takes."""

import ctypes
import importlib.util
import os
import sys

# From malloc.h of glibc: option, value.
KEEP = {
    "M_MMAP_MAX": (-4, 0),  # large blocks come from the heap, not from mmap
    "M_TRIM_THRESHOLD": (-1, -1),  # the heap is never given back
    "M_TOP_PAD": (-2, 64 << 20),
    "M_ARENA_MAX": (-8, 1),  # one heap for all threads
}
ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def keep_freed_memory() -> bool:
    """On a CPU with glibc: memory once used stays with the process. Returns whether it was done.

    XLA:CPU frees its temporaries after every step; each next step then takes a page fault for every
    4 KiB of them, 20 % of a small model's time. To be called before the first use of a device. The
    price is a larger resident size, so it is for a program to decide, not for `import mlm_jax`.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms != "cpu" and any(importlib.util.find_spec(name) for name in ACCELERATORS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent on macOS and musl
    return mallopt is not None and all([mallopt(*option) for option in KEEP.values()])


def peak_resident_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# For GPUs, by name. No set is best everywhere: benchmarks/train_step.py compares them.
OVERLAP = {
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    "xla_gpu_enable_while_loop_double_buffering": "true",
}
FEW_MESSAGES = {
    "xla_gpu_all_gather_combine_threshold_bytes": str(256 << 20),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(256 << 20),
    "xla_gpu_all_reduce_combine_threshold_bytes": str(256 << 20),
}
XLA_PRESETS = {
    "default": {}, "overlap": OVERLAP, "overlap_large": OVERLAP | FEW_MESSAGES,
}  # fmt: skip


def set_xla_flags(preset: str) -> None:
    """Adds a preset to XLA_FLAGS; flags that are there already keep their value."""
    given = os.environ.get("XLA_FLAGS", "")
    flags = [f"--{k}={v}" for k, v in XLA_PRESETS[preset].items() if f"--{k}=" not in given]
    if flags:
        os.environ["XLA_FLAGS"] = " ".join([given, *flags]).strip()


def missing_xla_flags(preset: str) -> list[str]:
    """Names of the preset that XLA_FLAGS does not have."""
    return [name for name in XLA_PRESETS[preset] if name not in os.environ.get("XLA_FLAGS", "")]
