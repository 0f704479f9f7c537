"""Keep batch normalization in float32 when a model is cast to half precision."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from batchnorm.model import account
from batchnorm.model.account import Change
from batchnorm.model.discovery import Norm, constant_norms, fits, matching, refuse_no_model
from batchnorm.model.mixing import Mixin, mix, unmix
from batchnorm.variants.frozen import FrozenBatchNorm

HALVES = {torch.float16, torch.bfloat16}


class Float32(Mixin):
    """A mixin, put before a layer's own class: casts to half precision pass its tensors by."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def kept(t: Tensor) -> Tensor:
            cast = fn(t)
            # from t itself: what was rounded to half does not come back
            return t.to(cast.device, torch.float32) if cast.dtype in HALVES else cast

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call, no-any-return]


def keep_float32(
    model: nn.Module, pattern: str | Sequence[str] = "*", *, keep: bool = True
) -> nn.Module:
    """Let batch norms keep float32 parameters and statistics in a model of half precision; in place.

    running ← running + momentum · (batch − running) stands still in half precision once the step is
    below half of the last digit. After this call `model.half()`, `model.bfloat16()` and `model.to()`
    cast everything else; the layers take inputs of half precision and give outputs of it, as under
    autocast, and compute in float32. Call it before the cast: what was rounded stays rounded.
    Classes, parameters, state dict and hooks stay; copies and pickles keep it.

    Args:
        model: any model with batch norm in it.
        pattern: which layers, by name, with * and ?; or several patterns.
        keep: False lets casts reach the layers again.

    Returns:
        The model. `changes(model)` names the layers.
    """
    refuse_no_model(model, "keep_float32")
    entries = [Change(name, **_set(layer, keep)) for name, layer in matching(model, pattern)]
    for name, constants in constant_norms(model).items():
        if not fits(name, pattern):
            continue
        if isinstance(constants, FrozenBatchNorm):
            entries.append(Change(name, **_set(constants, keep)))
        else:  # which may not take an input of another dtype
            what = f"a {type(constants).__name__}, which follows casts"
            entries.append(Change(name, done=False, what=what))
    return account.record(model, "keep_float32", entries)


def _set(layer: Norm | FrozenBatchNorm, keep: bool) -> dict[str, Any]:
    if keep == isinstance(layer, Float32):
        return {"done": False, "what": f"{'stayed' if keep else 'did not stay'} in float32 already"}
    if not keep:
        unmix(layer, Float32)
        return {"done": True, "what": "follows casts again"}
    mix(Float32, layer)
    half = [t for t in (*layer.parameters(), *layer.buffers()) if t.dtype in HALVES]
    if half:
        layer.float()
    return {"done": True, "what": f"stays in float32{', rounded before' if half else ''}"}
