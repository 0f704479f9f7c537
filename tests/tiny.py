"""Data and networks for tests: small, fast, and learnable. Also what `--data tiny:images` finds."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.lab.data import Images


def images(train: int = 320, test: int = 96) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten noisy patterns of 28×28 pixels."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.rand(10, 1, 28, 28, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 10
        noise = torch.rand(count, 1, 28, 28, generator=generator)
        return 0.7 * patterns[labels] + 0.3 * noise, labels

    return (*draw(train), *draw(test))


def as_images() -> Images:
    return Images(*images())


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """The same as loaders, the first one shuffled."""
    train_images, train_labels, test_images, test_labels = images()
    train = DataLoader(TensorDataset(train_images, train_labels), batch_size=32, shuffle=True)
    return train, DataLoader(TensorDataset(test_images, test_labels), batch_size=64)


def network() -> nn.Module:
    """A user's network: dropout, a residual branch whose last weight starts at 0, a shared norm."""
    return Residual()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(4)
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(8 * 7 * 7, 10)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(self.pool(x))).relu()
        x = x + self.norm2(self.conv2(x))
        return self.linear(self.dropout(x.relu()).flatten(1))


def without_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def raises() -> nn.Module:
    raise KeyError("the weights")


def not_a_network() -> nn.Module:
    return 3  # type: ignore[return-value]
