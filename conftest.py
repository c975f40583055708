"""Which modules pytest can import, and how many tests run at a time with `-n auto` (pytest-xdist)."""
import os
from importlib.util import find_spec

import pytest

collect_ignore = []  # an import that fails in any other module is an error, not a skip
if find_spec('ffcv') is None:  # these compile its pipeline when they are imported
    collect_ignore += ['alignmix_lab/data/ffcv/decoder.py', 'alignmix_lab/data/ffcv/loader.py']

CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
if workers := int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 0)):  # before torch is imported, and for what tests start
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, CORES // workers)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One a core, and at most eight, since each holds a torch of its own in memory."""
    return min(8, CORES)
