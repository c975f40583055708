"""Full precision for the mathematics, whatever the caller has switched on."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The legacy torch.get_float32_matmul_precision() raises once a user has set one of these, and torch < 2.9 lacks them.
_MATMUL = [
    backend for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, 'matmul', None))
    if hasattr(backend, 'fp32_precision')
]


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Convert to float32, except for float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast and the TF32 and bf16 shortcuts of float32 matmuls.

    A squared distance of 1000 is off by about 1 in TF32, and exp(-M / eps) with eps = 0.1 turns that into e^10. The
    switches are process-wide, so use this inside operators that torch.compile does not trace.
    """
    saved: Any
    if not _MATMUL:
        saved = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('highest')
    else:
        saved = [backend.fp32_precision for backend in _MATMUL]
        for backend in _MATMUL:
            backend.fp32_precision = 'ieee'
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if not _MATMUL:
            torch.set_float32_matmul_precision(saved)
        else:
            for backend, precision in zip(_MATMUL, saved, strict=True):
                backend.fp32_precision = precision
