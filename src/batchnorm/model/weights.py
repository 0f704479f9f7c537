"""Files of weights: safetensors, or torch's with `weights_only`; nothing in them is executed."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError, brief

NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "weights")  # in this order
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # DDP's, torch.compile's, Lightning's


class Checkpoint:
    """A file of weights, with whatever else is in it (an optimizer's state, an epoch)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata: dict[str, str] | None = None
        self.content = self._read()
        self.state = _state_dict(self.content, path)
        self._prefix = ""
        self._fitting: set[str] = set()  # the keys of the model that it was loaded into

    def _read(self) -> Any:
        if not self.path.is_file():
            raise BatchNormError(f"there is no checkpoint {self.path}.")
        try:
            if self.path.suffix == ".safetensors":
                with _safetensors().safe_open(self.path, "pt") as file:
                    self._metadata = file.metadata()
                    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except ImportError:
            raise
        except pickle.UnpicklingError as error:
            raise BatchNormError(
                f"the checkpoint {self.path} holds more than weights, and loading it would run its "
                f"code ({brief(error)}). Save model.state_dict() alone, or as safetensors."
            ) from error
        except Exception as error:
            raise BatchNormError(
                f"the checkpoint {self.path} could not be read: {brief(error)}."
            ) from error

    def load_into(self, model: nn.Module) -> None:
        """Every key must fit, but for a prefix that all of them have in common."""
        wanted = set(model.state_dict())
        for prefix in ("", *PREFIXES):
            keys = [key.removeprefix(prefix) for key in self.state if key.startswith(prefix)]
            if len(keys) == len(self.state) and wanted & set(keys):
                self._prefix = prefix
                break
        stripped = {key.removeprefix(self._prefix): value for key, value in self.state.items()}
        if hasattr(self.state, "_metadata") and not self._prefix:
            stripped = self.state  # which knows old versions of the layers
        self._fitting = wanted
        try:
            model.load_state_dict(stripped)
        except RuntimeError as error:
            problems = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise BatchNormError(
                f"the checkpoint {self.path} does not fit {type(model).__name__}: {problems} "
                "Name the function that builds the model of these weights."
            ) from error

    def write(self, path: Path, model: nn.Module) -> None:
        """The same file with the model's values; what the model does not hold stays as it was."""
        values = model.state_dict()
        if gone := sorted(self._fitting - set(values)):
            raise BatchNormError(
                f"the model has lost {', '.join(gone)} since {self.path} was loaded into it, and a "
                "checkpoint of the rest does not fit the function that builds it. Save "
                "model.state_dict() by yourself, and build the model without them."
            )
        for key in self.state:
            own = values.get(key.removeprefix(self._prefix))
            if isinstance(own, Tensor):
                self.state[key] = own.to(self.state[key].dtype)
        content = self.state if path.suffix == ".safetensors" else self.content
        write(path, content, self._metadata)


def write(path: Path, content: Any, metadata: dict[str, str] | None = None) -> None:
    """By the suffix, safetensors or torch's; complete or not at all."""
    refuse_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        if path.suffix == ".safetensors":
            tensors = {key: value.clone().contiguous() for key, value in content.items()}
            _safetensors().torch.save_file(tensors, part, metadata)
        else:
            torch.save(content, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def refuse_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise BatchNormError(
            f"--to got {path} and wants a name that ends in {', '.join(SUFFIXES)}."
        )


SUFFIXES = (".safetensors", ".pt", ".pth")


def _state_dict(content: Any, path: Path) -> Any:
    """The tensors by name, wherever in the file they are."""
    if _is_state_dict(content):
        return content
    if isinstance(content, Mapping):
        for key in NESTED:
            if _is_state_dict(content.get(key)):
                return content[key]
    found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
    raise BatchNormError(
        f"the checkpoint {path} has no state dict: it holds {found}, and wanted are tensors by "
        f"name, at the top or under one of {', '.join(NESTED)}."
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(v, Tensor) for v in value.values())
    )


def _safetensors() -> Any:
    try:
        import safetensors.torch  # noqa: PLC0415  # only for files of that kind
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("safetensors is not installed", name="safetensors") from missing
    return safetensors
