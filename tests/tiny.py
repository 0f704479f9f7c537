"""Data and networks for tests: small, fast, and learnable. Also what `--data tiny:images` finds."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

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


def colour_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, labels, test, test_labels = images()
    return train.expand(-1, 3, -1, -1), labels, test.expand(-1, 3, -1, -1), test_labels


def eleven_classes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, labels, test, test_labels = images()
    return train, labels + 1, test, test_labels + 1


class Breaking:
    """A loader whose source goes away in the second pass; the first is for the statistics."""

    dataset = range(320)

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        train, labels, _, _ = images()
        for place, batch in enumerate(zip(train.split(32), labels.split(32), strict=True)):
            if self.passes == 2 and place == 2:
                raise OSError("the disk is gone\nand more")
            yield batch


def breaking() -> tuple[Breaking, DataLoader[tuple[Tensor, ...]]]:
    return Breaking(), loaders()[1]


def two_tensors() -> tuple[Tensor, ...]:
    return images()[:2]


def two_strings() -> tuple[str, str]:
    return "train", "test"


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Draws noise in the process that trains."""

    def __init__(self) -> None:
        self.images, self.labels, _, _ = images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] + 0.1 * torch.randn(1, 28, 28), self.labels[index]


def augmented(**options: object) -> tuple[DataLoader[tuple[Tensor, ...]], ...]:
    return DataLoader(Augmented(), 32, shuffle=True, **options), loaders()[1]


def double() -> nn.Module:
    return network().double()


def double_images() -> tuple[Tensor, ...]:
    train, labels, test, test_labels = images()
    return train.double(), labels, test.double(), test_labels


def one_image() -> tuple[Tensor, ...]:
    train, labels, test, test_labels = images()
    return train[:1], labels[:1], test, test_labels


def no_test_batches() -> tuple[DataLoader[tuple[Tensor, ...]], list[object]]:
    return loaders()[0], []


class Odd(nn.Module):
    """Lazy without parameters, called by keyword, with extra state and a name to be escaped."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {"a'b\"]</script>$": nn.LazyBatchNorm2d(affine=False), "c": nn.BatchNorm2d(1)}
        )
        self.linear = nn.Linear(784, 10)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.layers.values():
            x = norm(input=x)
        return self.linear(x.flatten(1))


def odd() -> nn.Module:
    return Odd()


def no_parameters() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784, affine=False))


def without_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def raises() -> nn.Module:
    raise KeyError("the weights")


def not_a_network() -> nn.Module:
    return 3  # type: ignore[return-value]
