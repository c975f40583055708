"""Timing of callables relative to each other: interleaved rounds, medians and quartiles, peak memory, hardware.

Clocks drift and machines are shared, so absolute times mean little. Each round times every case once, in rotating
order, and cases are compared by their ratio within a round.
"""
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> 'Spread':
        low, median, high = torch.tensor(values, dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        return cls(median, low, high)

    def __format__(self, spec: str) -> str:
        return f'{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})'


@dataclass(frozen=True)
class Timing:
    """Seconds per call in each round; cases timed together share their rounds."""
    seconds: list[float]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)

    def over(self, base: 'Timing') -> Spread:
        """Compute the ratio of this case's time to that of `base` by round; above 1 it is slower."""
        return Spread.of([mine / other for mine, other in zip(self.seconds, base.seconds, strict=True)])


def time_interleaved(
        cases: dict[str, Callable[[], object]], device: torch.device | str = 'cpu', rounds: int = 10, warmup: int = 2,
        calls: int = 1, clock: Callable[[], float] = time.perf_counter) -> dict[str, Timing]:
    """Time cases in turn, round after round.

    On a GPU, times are those between two events in the stream: they include waiting for the host but not the launch of
    the next case. Nothing is synchronised between the calls of a timing.

    Args:
        rounds: Number of rounds; each times every case once.
        warmup: Number of rounds before, which are not timed.
        calls: Calls of a case per timing, for cases shorter than the clock or the launch queue.
        clock: Clock for CPUs. time.process_time ignores other programs and adds up all threads.
    """
    device = torch.device(device)
    seconds = {name: [] for name in cases}
    names = list(cases)
    for round_ in range(-warmup, rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            taken = _time_calls(cases[name], calls, device, clock)
            if round_ >= 0:
                seconds[name].append(taken / calls)
    return {name: Timing(values) for name, values in seconds.items()}


def _time_calls(call: Callable[[], object], calls: int, device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != 'cuda':
        start = clock()
        for _ in range(calls):
            call()
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_memory(call: Callable[[], object], device: torch.device | str = 'cpu') -> int:
    """Measure the peak of the bytes of tensors that a call allocates.

    Uses the allocator's statistics on a GPU, and the profiler's allocation records on a CPU (which do not include
    memory allocated inside libraries, such as packed weights).
    """
    device = torch.device(device)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # else its first start reports the missing GPU as an error
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()  # kept until the profile ends, so that its release is not recorded
    changes = [
        (event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events()
        if event.name() == '[memory]']
    del result
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def hardware(device: torch.device | str = 'cpu') -> str:
    """Describe the GPU, or the CPU with its threads, and the versions of CUDA, torch and Python."""
    device = torch.device(device)
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        name = f'{properties.name}, {properties.total_memory / 2 ** 30:.0f} GiB, CUDA {torch.version.cuda}'
    else:
        name = f'{_cpu_name()}, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}'
    return f'{name}, torch {torch.__version__}, Python {platform.python_version()}'


def _cpu_name() -> str:
    try:
        with open('/proc/cpuinfo') as file:
            return next(line.split(':', 1)[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
