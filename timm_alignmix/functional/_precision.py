"""Where the mathematics runs in full precision whatever the caller has switched on."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Half precision and integers become float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and the TF32 / bf16 float32-matmul shortcuts off.

    A squared distance of 1000 is off by about 1 in TF32, and exp(-M / eps) with eps = 0.1 turns that into e^10.
    Changes process-wide state for its duration, so it belongs inside operators that torch.compile does not trace.
    """
    precision = torch.get_float32_matmul_precision()
    try:
        if precision != 'highest':
            torch.set_float32_matmul_precision('highest')
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision != 'highest':
            torch.set_float32_matmul_precision(precision)
