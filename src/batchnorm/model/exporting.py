"""Export a model to ONNX or to torch's own format, and compare what it then computes."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError, brief, needed
from batchnorm.model.calling import feed, tensors


@dataclass(frozen=True)
class Agreement:
    """How far exported outputs are from the model's in float64, beside the model's own dtype."""

    exported: float  # largest |exported − float64|
    model: float  # largest |model − float64|: what rounding does to the model itself
    largest: float  # largest |float64|

    @property
    def holds(self) -> bool:
        """Within a few times the model's own rounding, or 1e-5 of the largest output."""
        return self.exported <= max(16 * self.model, 1e-5 * self.largest)

    def __str__(self) -> str:
        return (
            f"largest difference from the model in float64 {self.exported:.2g}, the model's own "
            f"rounding {self.model:.2g}, largest output {self.largest:.2g}"
        )


def to_onnx(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write ONNX, by torch.onnx; see `_exported` for the batch."""
    for module in ("onnxscript", "onnxruntime"):  # also what compares: no file is left unproven
        needed(module, "an export to ONNX")
    program = _exported(model, inputs)
    with _quiet():
        onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
    assert onnx_program is not None  # noqa: S101  # dynamo=True gives one
    onnx_program.save(path)


def run_onnx(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What ONNX Runtime computes from the file."""
    import onnxruntime  # noqa: PLC0415  # only who exports needs it

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feeds)]


def to_torch(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write torch's exported program (.pt2), which needs none of the model's code."""
    program = _exported(model, inputs)
    with _quiet():
        torch.export.save(program, path)


def _exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """The first axis of every input may have any size, where the model allows it."""
    several = bool(inputs) and all(x.dim() and len(x) > 1 for x in inputs)
    batch = ({0: torch.export.Dim.AUTO},) * len(inputs)
    with _quiet():
        try:
            return torch.export.export(model, inputs, dynamic_shapes=batch if several else None)
        except Exception as error:
            raise BatchNormError(
                f"torch.export could not export {type(model).__name__}: {brief(error)}. "
                "changes() of the folded model tells what could not be traced."
            ) from error


def run_torch(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What the exported program computes."""
    with torch.no_grad():
        return tensors(torch.export.load(path).module()(*inputs))


def agreement(model: nn.Module, inputs: tuple[Tensor, ...], exported: list[Tensor]) -> Agreement:
    """Compare exported outputs with those of the model, in float64."""
    with torch.no_grad():
        own = tensors(feed(model, inputs))
        doubled = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        exact = tensors(feed(copy.deepcopy(model).double(), doubled))
    if [y.shape for y in exact] != [y.shape for y in exported]:
        raise BatchNormError(
            f"the exported outputs have shapes {[tuple(y.shape) for y in exported]}, the model's "
            f"{[tuple(y.shape) for y in exact]}."
        )

    def largest(ours: list[Tensor]) -> float:
        gaps = [(a.double() - b).abs().max() for a, b in zip(ours, exact, strict=True) if b.numel()]
        return max([0.0, *map(float, gaps)])

    return Agreement(largest(exported), largest(own), largest([torch.zeros_like(y) for y in exact]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn, log and print their own inner workings."""
    before = logging.root.manager.disable
    nowhere = StringIO()
    with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
