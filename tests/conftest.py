"""Fixtures shared by the whole suite."""
import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # before timm is imported: no test may reach for the network

import pytest
import torch

# Real photographs beside the checkout, for the few tests that want them. They are no part of the repository.
DATA_DIR = Path(__file__).resolve().parents[2] / 'shared' / 'data'


@pytest.fixture(autouse=True)
def fixed_seed():
    """Start every test from the same state of torch's global generator, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state per process; every test starts and ends without."""
    def reset():
        if state := sys.modules.get('accelerate.state'):
            state.AcceleratorState._reset_state(reset_partial_state=True)
    reset()
    yield
    reset()


@pytest.fixture(scope='session')
def launch() -> Callable[..., str]:
    """Callable: run `accelerate launch` with some words and environment variables, on the CPU; its output."""
    def run(*words: str, **variables: str) -> str:
        command = [sys.executable, '-m', 'accelerate.commands.launch', '--num_machines', '1', '--mixed_precision', 'no',
                   '--dynamo_backend', 'no', *words]
        env = {key: value for key, value in os.environ.items() if key not in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
        env.update(PYTHONPATH=str(Path(__file__).resolve().parents[1]), CUDA_VISIBLE_DEVICES='', **variables)
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # the launcher, which ends what it started
            output = 'timed out\n' + process.communicate()[0]
        assert process.returncode == 0, output[-6000:]
        return output
    return run


@pytest.fixture(scope='session', autouse=True)
def torch_threads():
    """Two threads at most: the models of the suite are tiny, more threads only wait for each other."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope='module')
def one_thread():
    """For modules whose tensors are so small that a second thread only waits; put back at their end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def real_data():
    """Callable: the path of a file of real data, or a skip that says which file is missing."""
    def find(name: str) -> Path:
        path = DATA_DIR / name
        if not path.exists():
            pytest.skip(f'real data {name} is not there (looked for it in {DATA_DIR})')
        return path
    return find


@pytest.fixture
def own_tables(monkeypatch):
    """Copies of timm's tables, and of what we registered, for one test: this process's timm stays as it is."""
    from timm.models import _registry as tables

    from timm_alignmix.weights import registry as ours
    for module in (tables, ours):
        for name, value in list(vars(module).items()):
            if isinstance(value, (dict, set)) and not name.startswith('__'):
                copied = copy.copy(value)
                if isinstance(value, dict) and all(isinstance(entry, (list, set)) for entry in value.values()):
                    copied.update({key: copy.copy(entry) for key, entry in value.items()})
                monkeypatch.setattr(module, name, copied)
    for name, module in list(sys.modules.items()):
        if name.startswith('timm') and isinstance(getattr(module, 'default_cfgs', None), dict):
            monkeypatch.setattr(module, 'default_cfgs', copy.copy(module.default_cfgs))
