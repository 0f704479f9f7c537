"""The commands on a model and a checkpoint: build, read, change, compare, write."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError, brief
from batchnorm.lab.plugins import resolve
from batchnorm.model import exporting, weights
from batchnorm.model.account import Changes, changes
from batchnorm.model.exporting import Agreement
from batchnorm.model.folding import fold as fold_model
from batchnorm.model.inventory import Summary
from batchnorm.model.inventory import summary as summarize
from batchnorm.model.recalibration import recalibrate as recalibrate_model
from batchnorm.model.weights import Checkpoint

BATCH = 256  # of data that comes as one tensor
EXPORTS: dict[str, tuple[Any, Any]] = {
    ".onnx": (exporting.to_onnx, exporting.run_onnx),
    ".pt2": (exporting.to_torch, exporting.run_torch),
}


@dataclass(frozen=True)
class Folded:
    """What `fold` did, and how far the outputs of what it wrote are from the model's."""

    changes: Changes
    agreement: Agreement | None = None


def made_by(spec: str) -> Any:
    """What `package.module:function` gives when it is called, or is, if it is a model."""
    made: Any = resolve(spec, "model")
    if not isinstance(made, nn.Module):
        try:
            made = made()
        except Exception as error:
            raise BatchNormError(
                f"the model {spec} raised {brief(error)} when it was called without arguments."
            ) from error
    return made


def build(spec: str, checkpoint: Path | None) -> tuple[nn.Module, Checkpoint | None]:
    """The model of `package.module:function`, with the weights of the file."""
    made = made_by(spec)
    if not isinstance(made, nn.Module):
        raise BatchNormError(
            f"the model {spec} gave a {type(made).__name__} and should give a torch.nn.Module."
        )
    if checkpoint is None:
        return made, None
    read = Checkpoint(checkpoint)
    read.load_into(made)
    return made, read


def sample_inputs(shapes: list[str], function: str | None) -> tuple[Tensor, ...] | None:
    """Random tensors of shapes such as "2,3,224,224", or what the user's function gives."""
    if function is not None:
        given = resolve(function, "inputs")()
        given = given if isinstance(given, tuple) else (given,)
        if not all(isinstance(x, Tensor) for x in given):
            raise BatchNormError(f"the inputs {function} should be a tensor or a tuple of tensors.")
        return given
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(_shape(s), generator=generator) for s in shapes) or None


def _shape(text: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise BatchNormError(f"--input got {text!r} and wants sizes such as 2,3,224,224.")
    return sizes


def fold(
    spec: str, checkpoint: Path | None, inputs: tuple[Tensor, ...] | None, to: Path | None
) -> Folded:
    """Fold, write, and compare what was written with the model as it was."""
    if to is not None and to.suffix not in {*EXPORTS, *weights.SUFFIXES}:
        kinds = ", ".join([*EXPORTS, *weights.SUFFIXES])
        raise BatchNormError(f"--to got {to} and wants a name that ends in one of {kinds}.")
    if to is not None and to.suffix in EXPORTS and inputs is None:
        raise BatchNormError(
            f"an export to {to.suffix} wants --input, such as --input 2,3,224,224."
        )
    model, _ = build(spec, checkpoint)
    folded = fold_model(model.eval(), inputs)
    if to is None:
        return Folded(changes(folded))
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix not in EXPORTS:
        weights.write(to, folded.state_dict())
        return Folded(changes(folded))
    assert inputs is not None  # noqa: S101  # refused above
    export, run = EXPORTS[to.suffix]
    export(folded, inputs, to)
    return Folded(changes(folded), exporting.agreement(model, inputs, run(to, inputs)))


def recalibrate(
    spec: str,
    checkpoint: Path,
    data: str,
    to: Path,
    *,
    samples: int | None = None,
    exact: bool = False,
    prior: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> Changes:
    """The checkpoint again, with the statistics of the data."""
    weights.refuse_suffix(to)
    model, read = build(spec, checkpoint)
    assert read is not None  # noqa: S101  # a checkpoint was given
    batches = batches_of(resolve(data, "data")(), data)
    recalibrate_model(model, batches, samples=samples, exact=exact, prior=prior, progress=progress)
    read.write(to, model)
    return changes(model)


def batches_of(given: Any, spec: str) -> Iterable[Any]:
    """A loader, the first of a tuple of loaders, or a tensor of inputs, the first of a tuple."""
    first: Any = given[0] if isinstance(given, tuple) and given else given
    if isinstance(first, Tensor):
        return torch.split(first, BATCH)
    if not isinstance(first, Iterable):
        raise BatchNormError(
            f"the data {spec} gave a {type(given).__name__} and should give a loader, a tensor of "
            "inputs, or a tuple that begins with one of them."
        )
    batches: Iterable[Any] = first
    return batches


def summary(
    spec: str, checkpoint: Path | None, inputs: tuple[Tensor, ...] | None, *, train: bool
) -> Summary:
    """What batch norm there is in the model."""
    model, _ = build(spec, checkpoint)
    return summarize(model.train(train), inputs)
