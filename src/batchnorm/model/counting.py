"""Let the running statistics move once, however many forward passes a step takes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import distributed, nn

from batchnorm import masks
from batchnorm.errors import BatchNormError
from batchnorm.model.account import log
from batchnorm.model.discovery import SYNCHRONISED, batch_norms, refuse_no_model
from batchnorm.model.freezing import moves_while_frozen
from batchnorm.model.recalibration import Moments
from batchnorm.variants.ghost import GhostBatchNorm
from batchnorm.variants.sync import SyncBatchNorm
from batchnorm.variants.variant import Variant, recomputing


@contextmanager
def one_update(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, batches move no running statistics; at the end all of them move them once, together.

        running ← (1 − momentum) · running + momentum · (mean and unbiased variance of all values)

    and the counter by 1. For gradient accumulation, where every micro-batch would count as a batch,
    and for activation checkpointing of either kind, whose recomputation would count again:

        with batchnorm.one_update(model):
            for batch in micro_batches:
                (loss(model(batch)) / len(micro_batches)).backward()
        optimizer.step()

    Each micro-batch is normalized by its own statistics still; for the large batch's see
    `accumulate`. In the first layer the running statistics are the large batch's. A layer that is
    called several times moves once, too. A forward that runs inside a backward pass is taken for a
    recomputation. Should anything raise, the statistics stay.

    Args:
        model: any model with batch norm in it. Layers that do not move their statistics (frozen, in
            evaluation mode, inside `no_update`) are left as they are.

    Yields:
        The model.

    Raises:
        BatchNormError: one_update is on for a layer already; a layer whose statistics move by a rule
            of their own (`RenormBatchNorm`, `EstimatorBatchNorm`, frozen with update=True).
    """
    refuse_no_model(model, "one_update")
    norms = batch_norms(model)
    _refuse(norms)
    layers = [m for m in norms.values() if m.running_mean is not None]
    if not layers:
        log.warning("one_update: no batch norm in the model, nothing to do")
    gathered = [_Gathered(layer) for layer in layers]
    with ExitStack() as hooks:
        hooks.callback(lambda: INSIDE.difference_update(layers))
        INSIDE.update(layers)
        for each in gathered:
            before = each.layer.register_forward_pre_hook(each.lend, with_kwargs=True)
            hooks.enter_context(before)
            after = each.layer.register_forward_hook(each.take, always_call=True)
            hooks.enter_context(after)
        yield model
    for each in gathered:
        each.move()


INSIDE: WeakSet[nn.Module] = WeakSet()  # layers that a one_update holds


def _refuse(norms: dict[str, Any]) -> None:
    for name, layer in norms.items():
        if layer in INSIDE:
            raise BatchNormError(
                f"one_update is on for {name!r} already, and its statistics move once. Leave the inner "
                "one out."
            )
        own = isinstance(layer, Variant) and not isinstance(layer, GhostBatchNorm)
        if own or moves_while_frozen(layer):
            raise BatchNormError(
                f"one_update: {name!r}, a {type(layer).__name__}, moves its statistics by a rule of its "
                'own. Convert it back, convert(model, "ours"), or unfreeze it.'
            )


class _Gathered:
    """What one layer saw: its buffers are lent empty ones, into which it writes a batch's alone."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.moments = Moments()
        self.calls = 0
        self._own: list[tuple[dict[str, Any], float | None, int] | None] = []

    def lend(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (layer.training and layer.track_running_stats):
            self._own.append(None)
            return
        x, keep = masks.called(args, kwargs)
        count = x.numel() // max(x.shape[1], 1) if keep is None else int(keep.sum())
        if count < 2 and not isinstance(layer, SYNCHRONISED):
            self._own.append(None)  # it raises, or takes its running statistics: single_values
            return
        own = dict(layer.named_buffers(recurse=False))
        self._own.append((own, layer.momentum, count))
        # a synchronised one learns in the call that it may have to use its running statistics
        copied = isinstance(layer, SyncBatchNorm)
        for name, buffer in own.items():
            lent = torch.clone if copied and buffer.is_floating_point() else torch.zeros_like
            setattr(layer, name, lent(buffer))
        layer.momentum = 1.0  # what it writes is the batch's

    def take(self, layer: Any, *_: Any) -> None:
        if (kept := self._own.pop()) is None:
            return
        own, layer.momentum, count = kept
        mean, var_unbiased = layer.running_mean, layer.running_var
        # not where the layer raised
        wrote = "num_batches_tracked" not in own or int(layer.num_batches_tracked) > 0
        for name, buffer in own.items():
            setattr(layer, name, buffer)
        count = _together(layer, count)
        if recomputing() or not wrote or count < 2:
            return
        self.moments.merge(mean, var_unbiased.double() * ((count - 1) / count), count)

    @torch.no_grad()
    def move(self) -> None:
        layer, moments = self.layer, self.moments
        if not moments.count:
            return
        share = layer.momentum
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if share is None:
                share = 1 / int(layer.num_batches_tracked)
        for running, batch in (
            (layer.running_mean, moments.mean),
            (layer.running_var, moments.var_unbiased),
        ):
            running.copy_(running.to(batch).lerp(batch, share or 0.0))


def _together(layer: Any, count: int) -> int:
    """How many values the statistics of a call are of: a synchronised layer's of all processes."""
    if isinstance(layer, SyncBatchNorm) and layer.count is not None:
        return int(layer.count.max())
    if isinstance(layer, SYNCHRONISED) and distributed.is_initialized():
        return count * distributed.get_world_size(layer.process_group)
    return count
