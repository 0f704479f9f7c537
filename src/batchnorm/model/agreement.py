"""Give the running statistics of all processes the same values."""

import zlib
from typing import Any

import torch
from torch import Tensor, distributed, nn

from batchnorm.errors import BatchNormError
from batchnorm.model import account
from batchnorm.model.account import Change
from batchnorm.model.discovery import batch_norms, refuse_no_model


def synchronize_buffers(
    model: nn.Module, source: int | None = None, process_group: Any = None
) -> nn.Module:
    """Make the running statistics equal in all processes, in place; return the model.

    Without a source they become those of what all processes have seen together, each weighing the
    same (the variance is the mean of the variances and the variance of the means):

        mean ← Σ mean_r / R,    var ← Σ var_r / R + Σ (mean_r − mean)² / R,

    and the counter the largest. With one they become its own. For a model that trained with
    statistics of each process, before evaluation or saving; DDP takes those of rank 0 at each
    forward, where `broadcast_buffers` is on. One exchange for all layers.

    Args:
        model: any model with batch norm in it, the same in every process.
        source: the rank in the group whose statistics all take.
        process_group: the processes; None: all.

    Returns:
        The model. `changes(model)` names the layers.

    Raises:
        BatchNormError: a process with other layers; a source that is no rank of the group.
    """
    refuse_no_model(model, "synchronize_buffers")
    layers = {n: m for n, m in batch_norms(model).items() if m.running_mean is not None}
    if not (distributed.is_available() and distributed.is_initialized()):
        left = [Change(name, done=False, what="no process group runs") for name in layers]
        return account.record(model, "synchronize_buffers", left)
    ranks = distributed.get_world_size(process_group)
    if source is not None and not 0 <= source < ranks:
        raise BatchNormError(
            f"synchronize_buffers got source={source} and wants a rank from 0 to {ranks - 1}."
        )
    everyone = _gathered(list(layers.values()), _mark(layers), process_group)
    place = 0
    for layer in layers.values():
        place = _take(layer, everyone, place, source)
    return account.record(
        model, "synchronize_buffers",
        [Change(name, done=True, what=f"made equal in {ranks} processes") for name in layers],
        source="all" if source is None else source,
    )  # fmt: skip


def _mark(layers: dict[str, Any]) -> int:
    """What models with the same layers have in common."""
    sizes = [(name, len(layer.running_mean)) for name, layer in layers.items()]
    return zlib.crc32(repr(sizes).encode())


def _gathered(layers: list[Any], mark: int, group: Any) -> Tensor:
    """(processes, values): each layer's mean, variance and counter."""
    ranks = distributed.get_world_size(group)
    marks: list[Any] = [None] * ranks
    distributed.all_gather_object(marks, mark, group=group)  # sizes first: tensors must have one
    if strangers := [rank for rank, other in enumerate(marks) if other != mark]:
        raise BatchNormError(
            f"synchronize_buffers: this process has other layers than rank {strangers[0]}. Pass the "
            "same model in every process."
        )
    device = layers[0].running_mean.device if layers else torch.device("cpu")
    values = [torch.empty(0, dtype=torch.float64, device=device)]
    for layer in layers:
        counter = layer.num_batches_tracked
        count = values[0].new_zeros(1) if counter is None else counter.reshape(1)
        values += [
            v.to(device, torch.float64) for v in (layer.running_mean, layer.running_var, count)
        ]
    mine = torch.cat(values)
    everyone = mine.new_empty((ranks, len(mine)))
    distributed.all_gather(list(everyone), mine, group=group)
    return everyone


def _take(layer: Any, everyone: Tensor, place: int, source: int | None) -> int:
    """Write one layer's statistics; return where the next one's begin."""
    channels = len(layer.running_mean)
    mean, var, count = everyone[:, place : place + 2 * channels + 1].split(
        [channels, channels, 1], 1
    )
    if source is None:
        between = mean.var(0, correction=0)
        new = (mean.mean(0), var.mean(0) + between, count.max())
    else:
        new = (mean[source], var[source], count[source, 0])
    layer.running_mean.copy_(new[0])
    layer.running_var.copy_(new[1])
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.copy_(new[2])
    return place + 2 * channels + 1
