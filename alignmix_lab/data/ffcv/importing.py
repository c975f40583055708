"""The only place that imports FFCV, so that everything else works without it."""
import contextlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch

INSTALL = (
    'on Debian/Ubuntu: sudo apt-get install -y build-essential pkg-config libturbojpeg0-dev libopencv-dev, '
    'then: pip install ffcv==1.0.2 setuptools'
)


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restore the number of torch threads, which FFCV changes on import and with every loader."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def import_ffcv() -> ModuleType:
    """Import FFCV.

    Raises:
        ImportError: FFCV or one of its libraries is missing; the message says how to install them.
        ValueError: NUMBA_THREADING_LAYER selects the layer that aborts the process if two loaders run at once.
    """
    if os.environ.get('NUMBA_THREADING_LAYER') == 'workqueue':
        raise ValueError(
            'NUMBA_THREADING_LAYER=workqueue aborts the process when two FFCV loaders run at once; unset it or use omp')
    try:
        with torch_threads_kept():
            import ffcv
            import ffcv.fields.basics
            import ffcv.fields.rgb_image
            import ffcv.loader.epoch_iterator
            import ffcv.memory_managers.os_cache
            import ffcv.pipeline.compiler
            import ffcv.transforms
            import ffcv.types
            import numba
    except ImportError as error:
        raise ImportError(f'FFCV cannot be imported ({error}). To install it, {INSTALL}') from error
    if 'NUMBA_THREADING_LAYER' not in os.environ:
        numba.config.THREADING_LAYER = 'threadsafe'
    ffcv.memory_managers.os_cache.OSCacheManager.compile_reader = _compile_reader
    return ffcv


def _compile_reader(manager: Any) -> Callable:
    """Compile FFCV's page cache reader with its own numba types.

    FFCV's version marks the shared type uint8[::1] as read-only. The process uses that object as a dictionary key, so
    the finalizers of all functions compiled before fail at the next garbage collection.
    """
    import ffcv
    from numba import types, uint64

    def read(address, state):
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address:address + size]

    content = types.Array(types.uint8, 1, 'C', readonly=True)
    signature = content(uint64, types.Tuple([content, uint64[::1], uint64[::1]]))
    return ffcv.pipeline.compiler.Compiler.compile(read, signature)
