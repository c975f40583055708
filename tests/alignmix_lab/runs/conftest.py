"""Several processes, connected as a launcher would."""
import importlib
import multiprocessing.forkserver
import os
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope='package')
def on_processes():
    """Callable: run a function of workers.py on so many processes, connected as a launcher would.

    They are forks of one process that has imported everything once.
    """
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    workers = importlib.import_module('workers')
    context = multiprocessing.get_context('forkserver')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join([folder, str(ROOT)]))
        context.set_forkserver_preload(['workers'])
        multiprocessing.forkserver.ensure_running()

    def run(count: int, target: str, *args) -> None:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        processes = [
            context.Process(target=workers.begin, args=(rank, count, port, getattr(workers, target), *args))
            for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(400)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0] * count
    yield run
    sys.path.remove(folder)
