"""Where batches come from: tensors in memory, or a user's loaders."""

import copy
import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from batchnorm.errors import BatchNormError, brief
from batchnorm.lab.data import Images, Loaders

Batch = tuple[Tensor, Tensor]  # (N, ...) inputs, (N,) labels

EVALUATION_BATCH = 256  # the fastest on two cores: larger ones fall out of the cache


class Batches(Protocol):
    """What training asks of data."""

    train_images: int
    test_images: int
    steps_per_epoch: int
    digest: str

    def train(self, seed: int, epoch: int) -> Iterator[Batch]:
        """One epoch's batches, in an order that seed and epoch decide."""

    def test(self) -> Iterator[Batch]:
        """All test batches, always in the same order."""

    def held_out(self) -> Iterator[Batch]:
        """Training images that are not trained on, always in the same order; maybe none."""

    def population(self, images: int) -> Iterator[Batch]:
        """Training batches, `images` of them or all, for population statistics."""


class TensorBatches:
    """Batches cut from tensors in memory."""

    def __init__(
        self,
        images: Images,
        batch_size: int,
        train_images: int | None,
        *,
        held_out_images: int = 0,
        test_images: int | None = None,
    ) -> None:
        kept = len(images.train_images) - held_out_images
        if held_out_images and kept < (train_images or 1):
            raise BatchNormError(
                f"there are {len(images.train_images)} training images, of which "
                f"{train_images or 'some'} should be trained on and {held_out_images} held out. "
                "Ask for fewer."
            )
        self._held_out = (images.train_images[kept:], images.train_labels[kept:])
        count = kept if train_images is None else train_images
        self._inputs = images.train_images[:count]
        self._labels = images.train_labels[:count]
        self._test = (images.test_images[:test_images], images.test_labels[:test_images])
        self._batch_size = batch_size
        self.train_images = len(self._inputs)
        self.test_images = len(self._test[0])
        # a last batch of one image has no variance: it is left out
        whole, rest = divmod(self.train_images, batch_size)
        self.steps_per_epoch = whole + (rest > 1)
        if not self.steps_per_epoch:
            raise BatchNormError("there is 1 training image, and a batch wants 2 or more.")
        self.digest = images.digest

    def train(self, seed: int, epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(self.train_images, generator=generator)
        for indices in order.split(self._batch_size)[: self.steps_per_epoch]:
            yield self._inputs[indices], self._labels[indices]

    def test(self) -> Iterator[Batch]:
        yield from _pieces(*self._test)

    def held_out(self) -> Iterator[Batch]:
        yield from _pieces(*self._held_out)

    def population(self, images: int) -> Iterator[Batch]:
        yield from _pieces(self._inputs[:images], self._labels[:images])


class LoaderBatches:
    """Batches from two loaders, in whatever order those make from torch's random state."""

    def __init__(self, loaders: Loaders) -> None:
        self._loaders = loaders
        self.steps_per_epoch = _length(loaders.train, "train")
        self.train_images = _examples(loaders.train)
        self.test_images = _examples(loaders.test)
        self.digest = _digest_of_first(loaders.test)

    def train(self, seed: int, epoch: int) -> Iterator[Batch]:
        torch.manual_seed(epoch_seed(seed, epoch))
        for generator in _generators(self._loaders.train):
            generator.manual_seed(epoch_seed(seed, epoch))
        yield from _checked(self._loaders.train)

    def test(self) -> Iterator[Batch]:
        yield from _checked(self._loaders.test)

    def held_out(self) -> Iterator[Batch]:
        yield from ()

    def population(self, images: int) -> Iterator[Batch]:
        seen = 0
        for inputs, labels in _checked(_apart(self._loaders.train)):
            yield inputs, labels
            seen += len(inputs)
            if seen >= images:
                return


def epoch_seed(seed: int, epoch: int) -> int:
    """Another random state for every epoch, the same for every arm."""
    return seed * 1_000_003 + epoch


def _pieces(inputs: Tensor, labels: Tensor) -> Iterator[Batch]:
    if len(inputs):  # split() makes one empty piece of nothing
        yield from zip(inputs.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)


def _generators(loader: Any) -> list[torch.Generator]:
    """Random states of a DataLoader's own, which torch.manual_seed does not reach."""
    holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    holders.append(getattr(holders[-1], "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _apart(loader: Any) -> Any:
    """A loader with persistent workers has one iterator, and training is in the middle of it."""
    if not getattr(loader, "persistent_workers", False):
        return loader
    twin = copy.copy(loader)
    twin._iterator = None  # noqa: SLF001  # torch has no public way
    return twin


def _length(loader: Any, name: str) -> int:
    try:
        return len(loader)
    except TypeError as error:
        raise BatchNormError(
            f"the {name} loader ({type(loader).__name__}) has no length, which the schedule and the "
            "progress need. Give it a __len__ that counts its batches."
        ) from error


def _examples(loader: Any) -> int:
    """A DataLoader knows its data set's size; other loaders are counted by one pass."""
    dataset = getattr(loader, "dataset", None)
    if dataset is not None and hasattr(dataset, "__len__"):
        return len(dataset)
    return sum(len(inputs) for inputs, _ in _checked(loader))


def _digest_of_first(loader: Any) -> str:
    """SHA-256 of the first batch: loaders are known by what they give, and all may be too much."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # a loader that shuffles gives the same one
        batch = next(_checked(loader), None)
    if batch is None:
        raise BatchNormError(
            f"the test loader ({type(loader).__name__}) gives no batch, and nothing can be measured."
        )
    inputs, labels = batch
    digest = hashlib.sha256()
    for tensor in (inputs, labels):
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checked(loader: Any) -> Iterator[Batch]:
    for batch in _said(loader):
        match batch:
            case [Tensor() as inputs, Tensor() as labels] if len(inputs) == len(labels):
                yield inputs, labels
            case _:
                raise BatchNormError(
                    f"a loader gave a batch of type {type(batch).__name__} and should give a pair "
                    "(inputs, labels) of tensors of equal length."
                )


def _said(loader: Any) -> Iterator[Any]:
    """What a loader gives; what it raises is said to be its own."""
    try:
        yield from loader
    except Exception as error:
        raise BatchNormError(
            f"a loader ({type(loader).__name__}) raised {brief(error)}. What is "
            "recorded stays; mend the loader, and the same command goes on."
        ) from error
