"""Random numbers as a function of (seed, step, rank), so that resumed runs draw the same; no global state is used."""
import numpy as np
import torch
import torch.distributed as dist


class StepRandom:
    """Generators for one training step.

    Args:
        seed: Seed of the run, 0 to 2**63 - 1.
        rank: Rank of this process; None asks torch.distributed at each step.

    Attributes:
        shared: CPU generator, the same on all ranks, for the mode.
        host: CPU generator of this rank, for numbers that Python needs (box coordinates).
        device: Generator of this rank on the device of the data.
    """

    def __init__(self, seed: int, rank: int | None = 0) -> None:
        if not 0 <= seed < 2 ** 63 or rank is not None and rank < 0:
            raise ValueError(f'seed must be 0 to 2**63 - 1 and rank 0 or more, got seed={seed} and rank={rank}')
        self.seed, self.rank = seed, rank
        self.shared, self.host = torch.Generator(), torch.Generator()
        self.device = torch.Generator()

    def at(self, step: int, device: torch.device) -> 'StepRandom':
        """Seed the generators for a step and return self, without a device sync."""
        if self.device.device != device:
            self.device = torch.Generator(device)
        rank = self.rank
        if rank is None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        for generator, key in (
                (self.shared, (self.seed, step)),
                (self.host, (self.seed, step, rank, 0)),
                (self.device, (self.seed, step, rank, 1)),
        ):
            state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
            generator.manual_seed(int(state) & (2 ** 63 - 1))
        return self


def sample_beta(alpha: float, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw float32 lam ~ Beta(alpha, alpha) on the generator's device."""
    # A ratio of Gamma variables, since torch's Beta takes no generator.
    gamma = torch._standard_gamma(
        torch.full((2, *shape), alpha, dtype=torch.float32, device=generator.device), generator=generator)
    return gamma[0] / gamma.sum(dim=0)
