"""Loader workers that survive the signals by which a cluster announces the end of a job.

A scheduler signals every process of a job. The training process then finishes its update and saves a checkpoint, but it
would fail if one of its workers had exited.
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
    """iter(loader) with the signals blocked while the workers start, so that none of their threads receives one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(worker_id: int) -> None:
    """Exit on a signal of the parent process, which is how torch ends its workers; a `worker_init_fn`."""
    parent = multiprocessing.parent_process().pid

    def wait() -> None:
        while True:
            if signal.sigwaitinfo(_SIGNALS).si_pid == parent:
                os._exit(0)
    threading.Thread(target=wait, daemon=True).start()
