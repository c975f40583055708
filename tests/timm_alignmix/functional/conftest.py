"""Fixtures of the mathematics' tests."""
import pytest
import torch


@pytest.fixture(scope='package', autouse=True)
def one_thread():
    """The tensors here are so small that a second thread only waits: 200 times slower where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
