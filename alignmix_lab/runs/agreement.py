"""What all processes must know about an update before they make it, found out without waiting for the device.

Whether a loss was not finite, and whether a process was asked to stop: each process has an opinion, all must act alike.
The opinions are summed over the processes by a collective that starts between the last forward pass of an update and
its backward pass. When the host reads the sum, after it has issued the backward pass, the device still has that pass to
do: the host waits for the forward pass only, and the device never runs out of work.
"""
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import distributed, nn

# BSD's EX_TEMPFAIL: a failure that goes away when the command is run again.
EXIT_REQUEUE = 75
_RUNNING_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


class StopRequested(Exception):
    """The run was asked to stop and has saved what it needs to continue."""


class StopSignals:
    """Takes notice of signals.

    Args:
        numbers: The signals; by default those with which clusters announce that they will end a job.

    Attributes:
        received: The first signal, or None.
    """

    def __init__(self, numbers: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1)) -> None:
        self.numbers = numbers
        self.received: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take notice instead of ending the process. Signals reach the main thread only; in another nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._notice) for number in self.numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _notice(self, number: int, frame: object) -> None:
        self.received = self.received or signal.Signals(number)


class Agreement:
    """Whether the processes make an update, and whether they go on after it.

    Call :meth:`start` before the first forward pass of an update, :meth:`add` after each, :meth:`send` after the last,
    and :meth:`read` after the backward pass.

    Args:
        accelerator: The processes.
        module: Trainable module, whose running statistics :meth:`undo` puts back.
        stop: Whether this process was asked to stop.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, stop: StopSignals):
        self.stop = stop
        self.several = accelerator.num_processes > 1
        device = accelerator.device
        self.votes = torch.zeros(2, device=device)  # losses that are not finite, requests to stop
        self.cuda = device.type == 'cuda'
        if self.cuda:
            self.on_host = torch.zeros(2, pin_memory=True)
            self.stream, self.copied = torch.cuda.Stream(device), torch.cuda.Event()
        buffers = [buffer for name, buffer in module.named_buffers() if name.rpartition('.')[2] in _RUNNING_STATISTICS]
        by_type = [[b for b in buffers if b.dtype == dtype] for dtype in {buffer.dtype for buffer in buffers}]
        self.statistics = [(own, [buffer.clone() for buffer in own]) for own in by_type]  # now, before the update

    def start(self) -> None:
        self.votes.zero_()
        for now, before in self.statistics:
            torch._foreach_copy_(before, now)

    def add(self, loss: torch.Tensor) -> None:
        """Vote on a loss (0-d)."""
        self.votes[0] += ~loss.detach().isfinite()

    def send(self) -> None:
        """Begin to sum the votes of all processes."""
        if self.stop.received is not None:
            self.votes[1] = 1
        self.work = distributed.all_reduce(self.votes, async_op=True) if self.several else None
        if not self.cuda:
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.work is not None:
                self.work.wait()  # the stream waits, not the host
            self.on_host.copy_(self.votes, non_blocking=True)
            self.copied.record()

    def read(self) -> tuple[bool, bool]:
        """Whether every loss of the update was finite, and whether to stop after it: the same on all processes."""
        if self.cuda:
            self.copied.synchronize()
            votes = self.on_host
        else:
            if self.work is not None:
                self.work.wait()
            votes = self.votes
        bad, stop = votes.tolist()
        return bad == 0, stop > 0

    def undo(self) -> None:
        """Put back the running statistics from before the update."""
        for now, before in self.statistics:
            torch._foreach_copy_(now, before)
