"""One training epoch of LeNet with batch norm on Fashion-MNIST: the note's way beside ours.

The note's way, which is the book's: a Dataset that makes a picture of each stored image and turns it
into a tensor (what torchvision's FashionMNIST with ToTensor does), a DataLoader over it, and a
hand-written layer of elementary operations. Ours: the images in memory as one tensor, and
`batchnorm`'s layers. Both train the same network with the same recipe in one process, in turn;
medians, and the ratio of each pair, since seconds drift on a shared machine.

    [THP_MEM_ALLOC_ENABLE=1] python benchmarks/lenet.py [--rounds 5] [--train-images 60000] [--json FILE]
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

import figures
from batchnorm.lab import arms, networks
from batchnorm.lab.batches import TensorBatches
from batchnorm.lab.data import Images, fashion_mnist
from batchnorm.lab.environment import environment

BATCH = 256
Epoch = Callable[[], Iterator[tuple[Tensor, Tensor]]]


class StoredImages(Dataset[tuple[Tensor, int]]):
    """Bytes in memory, an image turned into a tensor each time it is asked for."""

    def __init__(self, images: Images) -> None:
        self.pixels = (images.train_images[:, 0] * 255).round().to(torch.uint8).numpy()
        self.labels = images.train_labels.tolist()
        self.transform = ToTensor()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def note_way(images: Images, workers: int) -> tuple[nn.Module, Epoch]:
    """The hand-written layer, fed by a DataLoader."""
    loader = DataLoader(StoredImages(images), BATCH, shuffle=True, num_workers=workers)
    return network("batch-note"), lambda: iter(loader)


def our_way(images: Images, arm: str) -> tuple[nn.Module, Epoch]:
    """Layers that call one operator, fed from one tensor in memory."""
    batches = TensorBatches(images, BATCH, None)
    return network(arm), lambda: batches.train(seed=0, epoch=0)


def network(arm: str) -> nn.Module:
    torch.manual_seed(0)
    model = networks.lenet()
    networks.initialize(model, "xavier-uniform")
    return arms.apply(model, arm)[0]


def first(images: Images, count: int) -> Images:
    return replace(
        images,
        train_images=images.train_images[:count],
        train_labels=images.train_labels[:count],
    )


def train(model: nn.Module, epoch: Epoch) -> float:
    """Seconds of one epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()
    start = time.perf_counter()
    for inputs, labels in epoch():
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Time every way in turn, print medians and ratios."""
    parser = figures.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train-images", type=int, default=60_000)
    options = parser.parse_args()
    images = first(fashion_mnist(), options.train_images)
    ways = {
        "the note's way, 0 workers": note_way(images, 0),
        "the note's way, 2 workers": note_way(images, 2),
        "in memory, torch.nn": our_way(images, "batch-torch"),
        "in memory, batchnorm": our_way(images, "batch"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            seconds[name].append(train(*way))
    report(seconds, options.json)


def report(seconds: dict[str, list[float]], path: Path | None) -> None:
    ours = seconds["in memory, batchnorm"]
    where = environment()
    pages = os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1"
    print(
        f"{where['processor']}, {torch.get_num_threads()} threads, torch {where['torch']}, "
        f"memory {'in huge pages' if pages else 'as torch allocates it by default'}"
    )
    print(f"{'one epoch':28}{'median s':>10}{'min':>8}{'max':>8}{'÷ ours':>10}")
    rows = {}
    for name, values in seconds.items():
        ratio = statistics.median(v / o for v, o in zip(values, ours, strict=True))
        median = statistics.median(values)
        print(f"{name:28}{median:10.2f}{min(values):8.2f}{max(values):8.2f}{ratio:10.2f}")
        rows[name] = {"seconds": values, "median": median, "ratio_to_ours": ratio}
    content = {"environment": where, "threads": torch.get_num_threads(), "ways": rows}
    figures.save(path, content)


if __name__ == "__main__":
    main()
