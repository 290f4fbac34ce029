"""Seeds of random generators, as functions of the run's seed, the epoch, the process and the image."""

import random

import numpy as np
import torch


def random_seed(*key: int) -> int:
    """A seed that depends on all numbers of the key, such as run seed, epoch and rank."""
    # The length distinguishes keys that differ by trailing zeros.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1)[0])


def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators from the key."""
    seed = random_seed(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
