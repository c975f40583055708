"""Interleaved timing and peak memory, on clocks and allocations that are known."""
import subprocess
import sys

import pytest
import torch

from alignmix_lab.runs.timing import Spread, Timing, hardware, peak_memory, time_interleaved


def test_rounds_interleave_and_rotate_with_one_timing_each():
    now, order = [0.0], []

    def case(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds
        return call

    timings = time_interleaved(
        dict(a=case('a', 2.0), b=case('b', 3.0)), rounds=4, warmup=1, calls=2, clock=lambda: now[0])
    assert ''.join(order) == 'bbaa' + 'aabb' + 'bbaa' + 'aabb' + 'bbaa'
    assert timings['a'].seconds == [2.0] * 4 and timings['b'].seconds == [3.0] * 4
    assert timings['b'].over(timings['a']) == Spread(1.5, 1.5, 1.5)


def test_ratios_are_taken_within_a_round():
    """A machine that slows down tenfold for two rounds out of four changes no ratio."""
    base, slower = Timing([1.0, 10.0, 1.0, 10.0]), Timing([2.0, 20.0, 2.0, 20.0])
    assert slower.over(base) == Spread(2.0, 2.0, 2.0)
    assert f'{Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]):.1f}' == '3.0 (2.0-4.0)'


@pytest.mark.parametrize('device', ('cpu', pytest.param('cuda', marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason='no CUDA device')])))
def test_peak_memory_counts_what_is_held_at_once(device):
    """Four tensors of a mebibyte one after the other, two at a time; what was there before is not counted."""
    size = 2 ** 18
    kept = torch.zeros(size, device=device)

    def call():
        x = kept + 1
        for _ in range(3):
            x = x + 1
        return x

    assert peak_memory(call, device) == pytest.approx(2 * 4 * size, rel=0.01)


def test_hardware_names_versions():
    assert torch.__version__ in hardware('cpu')


def test_the_profiler_says_nothing():
    code = 'import torch; from alignmix_lab.runs.timing import peak_memory; print(peak_memory(lambda: torch.ones(10)))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ('40\n', '')
