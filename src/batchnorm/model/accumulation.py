"""Gradient accumulation that is the large batch: outputs, gradients and running statistics."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError
from batchnorm.functional import check_channels
from batchnorm.layers import Forward, following
from batchnorm.model.account import log
from batchnorm.model.calling import eagerly
from batchnorm.model.discovery import activation_of, batch_norms, refuse_no_model
from batchnorm.model.freezing import moves_while_frozen
from batchnorm.variants.accumulation import Arrival, Lockstep, in_lockstep
from batchnorm.variants.sync import SyncBatchNorm, several
from batchnorm.variants.variant import Variant


def accumulate(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], micro_batches: Iterable[Any]
) -> Tensor:
    """The loss of the large batch, Σ_k loss_fn(model, micro_batch_k), normalized as the large batch.

    Each norm takes mean and variance over all micro-batches, as if they were one batch (see
    `batchnorm.variants.accumulation` for the equations): outputs, gradients and running statistics are
    the large batch's, up to rounding. No other layer ever sees more than a micro-batch.

        loss = batchnorm.accumulate(model, lambda m, batch: criterion(m(batch.x), batch.y) / n, batches)
        loss.backward()

    Each micro-batch runs the model in a thread, one at a time. Kept until the backward pass is what the
    large batch keeps, less what the norms give, which is computed again; with `convert(model,
    fuse=True)` that is their activations' outputs, too. Dropout draws other numbers than in one batch.

    Args:
        model: any model with batch norm in it, in training mode. The micro-batches must call the same
            norms in the same order.
        loss_fn: gives the micro-batch's share of the loss, a scalar: for a mean over n samples of all
            micro-batches, the sum over its own, divided by n.
        micro_batches: of any sizes, in any form that loss_fn takes.

    Returns:
        The sum, with the graph of all micro-batches: call `backward()` on it once. Under torch.no_grad
        the number alone.

    Raises:
        BatchNormError: no micro-batch; micro-batches that call different norms; a loss that is no
            scalar; inside, a checkpoint, a mask, a norm synchronised over several processes, a member
            of the family, a frozen norm whose statistics move, or another `accumulate`.
    """
    refuse_no_model(model, "accumulate")
    batches = list(micro_batches)
    if not batches:
        raise BatchNormError("accumulate got no micro-batch and wants one or more.")
    layers: dict[nn.Module, str] = {
        norm: name
        for name, norm in batch_norms(model).items()
        if norm.training or norm.running_mean is None
    }
    if not layers:
        log.warning("accumulate: no norm in the model takes the batch's statistics")
    _refuse_synchronised(layers)
    _refuse_others(batch_norms(model))
    losses: list[Any] = [None] * len(batches)

    def work(place: int) -> None:
        losses[place] = _scalar(loss_fn(model, batches[place]))

    with eagerly():
        works = [partial(work, place) for place in range(len(batches))]
        in_lockstep(works, layers, partial(_intercepted, layers))
    total: Tensor = torch.stack(losses).sum()
    return total


def _refuse_synchronised(layers: dict[nn.Module, str]) -> None:
    for layer, name in layers.items():
        own = isinstance(layer, SyncBatchNorm) and several(layer.process_group)
        if own or isinstance(layer, nn.SyncBatchNorm):
            raise BatchNormError(
                f"accumulate: {name!r} is synchronised over processes, and accumulate joins the "
                'micro-batches of one. Convert it back: convert(model, "ours").'
            )


def _refuse_others(norms: dict[str, Any]) -> None:
    for name, layer in norms.items():
        if isinstance(layer, Variant):
            raise BatchNormError(
                f"accumulate: {name!r} is a {type(layer).__name__}, which does not normalize by the "
                'large batch\'s statistics. Convert it back: convert(model, "ours").'
            )
        if moves_while_frozen(layer):
            raise BatchNormError(
                f"accumulate: {name!r} is frozen, and its statistics move with every micro-batch. "
                "Freeze it with update=False."
            )
        if {"normalize", "forward"} & vars(layer).keys():
            raise BatchNormError(
                f"accumulate: {name!r} is in an accumulate already. Pass all micro-batches to one."
            )


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BatchNormError(
            f"accumulate: loss_fn gave {what} and should give the micro-batch's share of the loss, a "
            "scalar: for a mean over n samples, the sum over its own divided by n."
        )
    return loss.reshape(())


@contextmanager
def _intercepted(layers: dict[nn.Module, str], lockstep: Lockstep) -> Iterator[None]:
    """Inside, the norms' own computation is the lockstep's; everything around it stays."""
    try:
        for layer, name in layers.items():
            ours = isinstance(layer, Forward)
            call = partial(_meet if ours else _meet_and_activate, lockstep, name, layer)
            # on the instance: nobody else's layer of that class notices
            vars(layer)["normalize" if ours else "forward"] = call
        yield
    finally:
        for layer in layers:
            vars(layer).pop("normalize" if isinstance(layer, Forward) else "forward", None)


def _meet(
    lockstep: Lockstep,
    name: str,
    layer: Any,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    axis: int = 1,
    pool: str | None = None,
) -> Tensor:
    _refuse_what_is_not_joined(name, mask, lockstep.gradients)
    layer._check_input_dim(x)  # noqa: SLF001  # torch has no public way
    check_channels(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, axis)
    taken, left = (activation, None) if residual is None else (None, activation)
    y = lockstep.meet(Arrival(layer, x.movedim(axis, 1), taken)).movedim(1, axis)
    return following(y, residual, left, pool)


def _meet_and_activate(lockstep: Lockstep, name: str, layer: Any, x: Tensor) -> Any:
    """torch.nn's layer, or one like timm's that goes on with an activation."""
    return activation_of(layer)(_meet(lockstep, name, layer, x))


def _refuse_what_is_not_joined(name: str, mask: Tensor | None, gradients: bool) -> None:
    if mask is not None:
        raise BatchNormError(
            f"accumulate: {name!r} is called with a mask, which is not joined over micro-batches. "
            "Leave out the mask or accumulate."
        )
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # noqa: SLF001  # torch has no public way
    inside = hooks is not None and "_checkpoint_hook" in hooks[0].__qualname__
    if inside or (gradients and not torch.is_grad_enabled()):
        where = "" if inside else " (use_reentrant=True), or under a torch.no_grad of loss_fn's own"
        raise BatchNormError(
            f"accumulate: {name!r} is called inside a checkpoint{where}: its recomputation would be "
            "alone with one micro-batch. accumulate computes again by itself: take that out, or put "
            "torch.no_grad around accumulate."
        )
