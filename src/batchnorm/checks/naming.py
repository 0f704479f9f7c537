"""Who calls a model, and by what name: read from the frames that stand when it is called."""

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from batchnorm.model.discovery import uncompiled

# none of them has the user's own variables, but that a notebook's are also in IPython's user_ns
PASSED_OVER = ("torch", "batchnorm", "IPython", "ipykernel")
FOLLOWED = 100  # the longest container that is looked into


def caller_of(module: nn.Module) -> tuple[str, nn.Module]:
    """The variable that holds the model, "" where none does, and the model.

    That is the module itself, or one that it is a part of and whose method calls it, as Lightning's
    `training_step` does. Names are those of the outermost frame: of a script's own `netD`, and not
    of the function's `model` that it was handed to.
    """
    frames = list(_frames())
    model = module
    for frame in frames:
        holder = frame.f_locals.get("self")
        if isinstance(holder, nn.Module) and any(part is model for part in holder.modules()):
            model = holder
    names = [name for frame in frames if (name := _name_in(frame, uncompiled(model)))]
    _let_go(frames)
    return (names[-1] if names else ""), model


def _let_go(frames: list[FrameType]) -> None:
    """Before Python 3.13 a frame keeps what was read of its variables, as long as it stands."""
    if sys.version_info >= (3, 13):
        return
    for frame in frames:
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a function's: a copy, not the variables
            frame.f_locals.clear()


def _frames() -> Iterator[FrameType]:
    """The callers who are the user's, the innermost first."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # who called
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in PASSED_OVER:
            yield frame
        frame = frame.f_back


def _name_in(frame: FrameType, model: nn.Module) -> str:
    """In a variable, an attribute of what has the method that runs, or a short container of either."""
    holder = frame.f_locals.get("self")
    variables = {name: value for name, value in frame.f_locals.items() if name != "self"}
    if not isinstance(holder, nn.Module):
        attributes = getattr(holder, "__dict__", {})
        variables |= {f"self.{name}": value for name, value in attributes.items()}
    return next((name for name, value in _parts(variables) if _is(value, model)), "")


def _parts(variables: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from variables.items()
    for name, value in variables.items():
        if type(value) in {list, tuple, dict} and len(value) <= FOLLOWED:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{name}[{key!r}]", each) for key, each in list(items))


def _is(value: Any, model: nn.Module) -> bool:
    # type(), since isinstance asks the object, which may be a proxy
    return issubclass(type(value), nn.Module) and uncompiled(value) is model
