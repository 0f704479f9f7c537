"""Keep padding out of the statistics of models that know nothing of masks.

Inside `masked` a batch-norm layer sees only the values that count, packed side by side, as if the
padding had never been there; what it gives is laid back into its place, with 0 where padding was.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError
from batchnorm.model.account import log
from batchnorm.model.discovery import batch_norms, refuse_no_model
from batchnorm.variants.ghost import GhostBatchNorm


@contextmanager
def masked(
    model: nn.Module,
    lengths: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    padded_to: int | None = None,
    axis: int = 2,
) -> Iterator[nn.Module]:
    """Inside, padding has no part in batch norm: not in its statistics, nor in its gradients.

    Each layer normalizes the packed values, (1, C, M) for M values that count, with its own forward
    and its own state: training and evaluation, running statistics and gradients are those of a
    batch without padding. Its outputs and gradients are 0 where padding was, and a NaN in the
    padding does not leak. Hooks of a layer see the packed values. Other layers see what they
    always see: a convolution reads the zeros.

    A layer that works at another resolution, T' steps instead of T, has `lengths` ⌈lengths / s⌉
    with the stride s = T / T' rounded, and, where T' > T, ⌈lengths · T' / T⌉. Inputs of shape (N, C), as behind a
    pooling, are taken whole; (N · T, C), as behind a reshape, are masked.

    Args:
        model: any model with batch norm in it; channels are axis 1.
        lengths: (N,), how many steps of each sample count, from the first one.
        mask: in its place, (N, T) or (N, *spatial), True where a value counts.
        padded_to: T, the length that the batch is padded to, for layers of another length.
        axis: the axis of the steps in a layer's input: 2 in (N, C, T), 3 in (N, C, F, T).

    Yields:
        The model.

    Raises:
        BatchNormError: both or none of lengths and mask, or of the wrong shape or dtype. From the
            model's forward, with the layer's name: an input that the mask does not fit; fewer than
            two values in training.
    """
    kept = _Kept(_mask(lengths, mask, padded_to), axis, padded_to is not None or mask is not None)
    refuse_no_model(model, "masked")
    layers = batch_norms(model)
    if not layers:
        log.warning("masked: no batch norm in the model, nothing to do")
    with ExitStack() as hooks:
        for name, layer in layers.items():
            packing = _Packing(kept, name)
            # before others' hooks on the way in, behind them on the way out: recalibrate's hook,
            # for one, takes the moments of the packed values
            pack = layer.register_forward_pre_hook(packing.pack, prepend=True, with_kwargs=True)
            hooks.enter_context(pack)
            hooks.enter_context(layer.register_forward_hook(packing.unpack))
        yield model


def _mask(lengths: Tensor | None, mask: Tensor | None, padded_to: int | None) -> Tensor:
    if (lengths is None) == (mask is None):
        raise BatchNormError(
            "masked wants either lengths, (N,), or mask=, (N, T) or (N, *spatial)."
        )
    if mask is not None:
        if mask.dtype != torch.bool or mask.dim() < 2:
            raise BatchNormError(
                f"masked got a mask of dtype {mask.dtype} and shape {tuple(mask.shape)} and wants "
                "torch.bool, (N, T) or (N, *spatial), True where a value counts."
            )
        return mask
    lengths = torch.as_tensor(lengths)
    if lengths.dim() != 1 or lengths.is_floating_point() or not len(lengths):
        raise BatchNormError(
            f"masked got lengths of dtype {lengths.dtype} and shape {tuple(lengths.shape)} and "
            "wants whole numbers, (N,): the steps of each sample that count."
        )
    total = int(lengths.max()) if padded_to is None else padded_to
    if int(lengths.min()) < 0 or int(lengths.max()) > total:
        raise BatchNormError(
            f"masked got lengths from {int(lengths.min())} to {int(lengths.max())} and wants them "
            f"from 0 to {total}, the length that the batch is padded to."
        )
    return torch.arange(total, device=lengths.device) < lengths[:, None]


class _Kept:
    """The mask, fitted to the input of a layer."""

    def __init__(self, mask: Tensor, axis: int, scaled: bool) -> None:
        self.mask, self.axis, self.scaled = mask, axis, scaled

    def of(self, x: Tensor, name: str) -> Tensor | None:
        """(N, *spatial), or as many values as broadcast to it; None where all of x counts."""
        mask = self.mask.to(x.device)
        if x.dim() == 2:
            if len(x) == len(mask):
                return None
            if len(x) == mask.numel():
                return mask.flatten()
            raise self._misfit(x, name)
        axes = list(range(2, x.dim()))
        if mask.dim() == 2:
            axes = [self.axis % x.dim()]
        if len(x) != len(mask) or mask.dim() != len(axes) + 1 or min(axes) < 2:
            raise self._misfit(x, name)
        for place, axis in enumerate(axes, start=1):
            mask = self._resized(mask, place, x, axis, name)
        shape = [len(x), *(x.shape[a] if a in axes else 1 for a in range(2, x.dim()))]
        return mask.reshape(shape).expand(len(x), *x.shape[2:])

    def _resized(self, mask: Tensor, place: int, x: Tensor, axis: int, name: str) -> Tensor:
        have, want = mask.shape[place], x.shape[axis]
        if have == want:
            return mask
        if not self.scaled or not have:
            raise self._misfit(x, name)
        steps = torch.arange(want, device=mask.device)
        if want < have:  # a strided layer's step j reads around j · stride
            nearest = (steps * ((2 * have + want) // (2 * want))).clamp(max=have - 1)
        else:
            nearest = steps * have // want
        return mask.index_select(place, nearest)

    def _misfit(self, x: Tensor, name: str) -> BatchNormError:
        return BatchNormError(
            f"masked: the layer {name} got an input of shape {tuple(x.shape)}, and the mask is "
            f"{tuple(self.mask.shape)} along axis {self.axis}. Pass padded_to=, the length that "
            "the batch is padded to, if layers work at other lengths; axis=, if the steps stand "
            "elsewhere; the lengths of every sample of the batch."
        )


class _Packing:
    """The two hooks of one layer."""

    def __init__(self, kept: _Kept, name: str) -> None:
        self._kept, self._name = kept, name
        self._places: list[tuple[Tensor | None, torch.Size]] = []

    def pack(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        """(N, C, *spatial) -> (1, C, M, 1, …), of the same rank."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        own = args[1:] or kwargs.keys() & {"mask", "axis"}  # this library's layers take them
        if own:
            raise BatchNormError(
                f"masked: the layer {self._name} is called with a mask or an axis of its own, and one "
                "of the two masks must do. Leave out masked, or the arguments."
            )
        keep = self._kept.of(x, self._name)
        if keep is None:
            self._places.append((None, x.shape))
            return (x,), {}
        if layer.training and isinstance(layer, GhostBatchNorm):
            raise BatchNormError(
                f"masked: the layer {self._name} takes the statistics of groups of samples, and "
                "packed values belong to none. Use a plain batch norm: batchnorm.convert(model)."
            )
        packed = x.movedim(1, -1)[keep]  # (M, C)
        if layer.training and len(packed) < 2:
            raise BatchNormError(
                f"masked: the mask leaves the layer {self._name} {len(packed)} values per channel, "
                "and training wants 2 or more. Leave out batches that are all padding."
            )
        self._places.append((keep, x.shape))
        if x.dim() == 2:
            return (packed,), {}
        return (packed.t().reshape(1, x.shape[1], -1, *[1] * (x.dim() - 3)),), {}

    def unpack(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """(1, C, M, 1, …) -> (N, C, *spatial), 0 where padding was."""
        del layer, args
        keep, shape = self._places.pop()
        if keep is None:
            return output
        values = output if len(shape) == 2 else output.reshape(shape[1], -1).t()
        laid = output.new_zeros((*keep.shape, shape[1])).index_put((keep,), values)
        return laid.movedim(-1, 1)
