"""Loader workers that outlive the signals with which a cluster announces the end of a job.

A scheduler signals every process of a job. The one that trains finishes its update and saves, for which it needs its
workers; it would die of an error if one of them were gone.
"""
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def iterate(loader: DataLoader) -> Iterator[Any]:
    """iter(loader), whose workers start with the signals blocked, so that no thread of theirs ever gets one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(worker_id: int) -> None:
    """End a worker that blocks the signals at one of its parent process, which is how processes end their children.

    Args:
        worker_id: Not used; this is a DataLoader's `worker_init_fn`.
    """
    parent = multiprocessing.parent_process().pid

    def wait() -> None:
        while True:
            if signal.sigwaitinfo(_SIGNALS).si_pid == parent:
                os._exit(0)
    threading.Thread(target=wait, daemon=True).start()
