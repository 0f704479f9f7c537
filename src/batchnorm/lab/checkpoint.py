"""The checkpoint of a cell: all that training needs to go on with the same numbers."""

from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError, brief
from batchnorm.lab import files


@dataclass
class Counters:
    """Where training stands; everything here is in the checkpoint."""

    step: int = 0
    seconds: float = 0.0  # of training alone
    wall_seconds: float = 0.0  # of sessions before this one
    epoch_loss: float = 0.0  # sums over the images of this epoch so far
    epoch_correct: int = 0
    epoch_images: int = 0
    last_seconds: float = 0.0  # at the evaluation before
    last_images: int = 0  # since the evaluation before
    diverged: bool = False

    def start_epoch(self) -> None:
        self.epoch_loss, self.epoch_correct, self.epoch_images = 0.0, 0, 0


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    counters: Counters,
    record_bytes: int,
) -> None:
    """Replace the checkpoint in one move: a kill leaves the old one or the new one, whole."""
    content = {
        "model": model.state_dict(),
        "plain": plain_tensors(model),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "counters": asdict(counters),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "record_bytes": record_bytes,
    }
    # through memory: torch.save into a full disk raises a RuntimeError that names no file
    buffer = BytesIO()
    torch.save(content, buffer)
    files.keep(buffer.getbuffer(), path)


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[Counters, int]:
    """Put everything back, torch's random state too; return the counters and the record's length."""
    try:
        content = torch.load(path, map_location="cpu")
        model.load_state_dict(content["model"])
    except OSError:
        raise
    except Exception as error:  # whatever a file that is not a checkpoint of ours makes torch raise
        raise BatchNormError(
            f"the checkpoint {path} cannot be read ({brief(error)}). Move it "
            "away: its cell then begins again."
        ) from error
    for name, tensor in content["plain"].items():
        place, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(place), attribute, tensor)
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict(content["scheduler"])
    torch.set_rng_state(content["random"])
    if content["random_cuda"]:
        torch.cuda.set_rng_state_all(content["random_cuda"])
    return Counters(**content["counters"]), content["record_bytes"]


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules keep as plain attributes, where no state dict sees them.

    The note's layer has its running statistics there, and others' layers may have.
    """
    return {
        f"{name}.{attribute}": value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor)
    }
