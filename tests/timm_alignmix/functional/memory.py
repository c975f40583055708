"""How large the largest tensor is that a computation makes, custom operators included."""
from collections.abc import Callable

import torch


def largest_allocation(compute: Callable[[], object], itemsize: int) -> int:
    """Elements of `itemsize` bytes in the largest allocation any single CPU operation kept or passed on."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        compute()
    return max(event.self_cpu_memory_usage for event in profile.events()) // itemsize
