"""A small stand-in for a data set: ten patterns of 16×16 pixels with noise, learnable in seconds."""

import torch
from torch.utils.data import TensorDataset


def digits(count: int, seed: int) -> TensorDataset:
    """`count` images, (1, 16, 16), and their classes."""
    patterns = torch.rand(10, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    noise = torch.randn(count, 1, 16, 16, generator=generator)
    return TensorDataset(patterns[labels] + 1.0 * noise, labels)
