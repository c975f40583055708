"""Agreement of all processes on an update, reached without stalling the device.

Every process may see a loss that is not finite, or a signal to stop, and then all of them have to act alike. Their
votes are summed by a collective between the last forward pass of an update and its backward pass. The host reads the
sum after it has queued the backward pass, so it only waits for the forward pass and the device stays busy.
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
    """The run was asked to stop, and has saved what it needs to continue."""


class StopSignals:
    """Records the first signal as `received`; by default those with which clusters announce the end of a job."""

    def __init__(self, numbers: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1)) -> None:
        self.numbers = numbers
        self.received: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals instead of ending the process. Only the main thread receives them; others change nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._record) for number in self.numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: object) -> None:
        self.received = self.received or signal.Signals(number)


class Agreement:
    """Joint decision of the processes whether to make an update, and whether to stop after it.

    Call :meth:`start` before the first forward pass of an update, :meth:`add` after each, :meth:`send` after the last,
    and :meth:`read` after the backward pass.

    :meth:`undo` restores the running statistics of `module`. `stop` has the signals that this process received.
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
        """Start summing the votes of all processes."""
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
        """Return whether every loss was finite and whether to stop after the update, the same on all processes."""
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
        """Restore the running statistics from before the update."""
        for now, before in self.statistics:
            torch._foreach_copy_(now, before)
