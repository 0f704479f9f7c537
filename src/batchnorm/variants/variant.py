"""What the members of the family have in common: torch's parameters and buffers, and evaluation.

A member computes something else than batch normalization in training, so it is no `_BatchNorm`:
tools that replace those (SyncBatchNorm's conversion, torch's and timm's fusions) would silently
drop what it does. This library's own tools find it by `Variant`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from batchnorm import masks
from batchnorm.errors import BatchNormError, no_tensor
from batchnorm.functional import batch_norm
from batchnorm.layers import STATE, as_leaf


class Variant(_NormBase):
    """In evaluation y = (x − running mean) / √(running var + eps) · weight + bias; see the members.

    Parameters, buffers and state dict have torch's names and shapes, so that the state dict of a
    batch norm loads into a member and the other way round.
    """

    ranks: tuple[int, ...] = ()  # of the inputs that the layer takes; empty: any from 2
    options: tuple[str, ...] = ()  # the arguments that only this member has

    def forward(self, input: Tensor, mask: Tensor | None = None, axis: int = 1) -> Tensor:
        """Normalize input: (N, C, *spatial); update the running statistics in training mode.

        mask: True where a value counts; axis: where the channels stand. See `batchnorm.batch_norm`.
        """
        if isinstance(input, fx.Proxy):
            leaf: Tensor = as_leaf(self, input, mask, axis)
            return leaf
        check_rank(self, input, self.ranks)
        masks.check_axis(type(self).__name__, input, axis)
        if input.shape[axis] != self.num_features:
            raise BatchNormError(
                f"{type(self).__name__}({self.num_features}) got {input.shape[axis]} channels in an "
                f"input of shape {tuple(input.shape)}; channels are axis {axis}. Build it with "
                f"num_features={input.shape[axis]}, or pass axis=, where the channels stand."
            )
        x, keep = masks.counted(input, mask, axis)
        y = self._forward(x, keep)
        return y if axis == 1 else y.movedim(1, axis)

    def _forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        if self.training:
            return self.train_on(x, keep)
        by_batch = self.running_mean is None  # as torch's layers, which then know nothing else
        return self.normalize(x, self.running_mean, self.running_var, by_batch, keep=keep)

    def train_on(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """The forward pass in training mode; keep: the mask in the rank of x."""
        raise NotImplementedError

    def normalize(
        self,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        by_batch: bool,
        momentum: float = 0.0,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Plain batch normalization with the layer's eps, weight and bias."""
        affine = (self.weight, self.bias)
        return batch_norm(x, mean, var, *affine, by_batch, momentum, self.eps, mask=keep)

    def running(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, of a layer that keeps them."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            raise BatchNormError(
                f"{type(self).__name__} got running_mean or running_var None, and wants both: it is "
                "about them. Give it buffers, or use BatchNorm."
            )
        return mean, var

    @property
    def updates(self) -> bool:
        """Training moves the running statistics: there are some, and nobody has paused them."""
        return self.running_mean is not None and self.track_running_stats

    def share(self) -> Tensor | float:
        """Count a batch; the weight that it has in the running statistics.

        momentum, or, where that is None, 1 / t: after t batches their plain average. The counter
        stays a tensor: reading it would wait for the device and break the graph of `torch.compile`.
        """
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None:
            return 0.0  # neither momentum nor a counter: alone, as torch's layers leave them
        return self.seen().reciprocal()

    def seen(self) -> Tensor:
        """The count of batches as a number to divide by: an integer's would be float32's."""
        assert self.num_batches_tracked is not None  # noqa: S101  # the caller asked
        assert self.running_mean is not None  # noqa: S101
        double = self.running_mean.dtype == torch.float64
        return self.num_batches_tracked.to(torch.float64 if double else torch.float32)

    @torch.no_grad()
    def move(self, mean: Tensor, var: Tensor) -> None:
        """running ← running + share · (batch − running)."""
        share = self.share()
        for running, batch in zip(self.running(), (mean, var), strict=True):
            step = share.to(running.dtype) if isinstance(share, Tensor) else share
            running.lerp_(batch.to(running), step)

    @contextmanager
    def moving_where(self, known: Tensor) -> Iterator[None]:
        """Inside, statistics move in these channels alone; a batch that moves none does not count."""
        buffers = [*self.running(), self.num_batches_tracked]
        before = [None if buffer is None else buffer.clone() for buffer in buffers]
        yield
        with torch.no_grad():
            for buffer, old, here in zip(buffers, before, (known, known, known.any()), strict=True):
                if buffer is not None and old is not None:
                    buffer.copy_(torch.where(here, buffer, old))

    @classmethod
    def of(cls, norm: _NormBase, **options: Any) -> Self:
        """This member in the place of a norm: its options, the same parameter and buffer objects."""
        unknown = set(options) - set(cls.options)
        if unknown:
            wanted = ", ".join(cls.options)
            raise BatchNormError(
                f"{cls.__name__} got {', '.join(sorted(unknown))} and wants "
                f"{wanted or 'no further arguments'}."
            )
        made = cls(norm.num_features, norm.eps, norm.momentum, device="meta", **options)
        made.ranks = ranks_of(norm)
        take(made, norm)
        return made

    def extra_repr(self) -> str:
        usual = super().extra_repr()  # type: ignore[no-untyped-call]
        return ", ".join([usual, *(f"{name}={getattr(self, name)}" for name in self.options)])

    def __prepare_scriptable__(self) -> NoReturn:
        raise BatchNormError(
            f"{type(self).__name__} cannot be compiled by TorchScript, which torch has deprecated. "
            "Use torch.export or torch.compile."
        )


RANKS: dict[type[_BatchNorm], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}


def ranks_of(norm: nn.Module) -> tuple[int, ...]:
    """Of the inputs that a norm takes; () for any."""
    if isinstance(norm, Variant):
        return norm.ranks
    kind = getattr(norm, "_before", type(norm))  # a synchronised one's
    return next((ranks for each, ranks in RANKS.items() if issubclass(kind, each)), ())


def take(made: _NormBase, norm: _NormBase) -> None:
    """The norm's switches, mode, and parameter and buffer objects, for a layer of the same size."""
    made.affine, made.track_running_stats = norm.affine, norm.track_running_stats
    for name in STATE:
        setattr(made, name, getattr(norm, name))
    made.train(norm.training)


def check_rank(layer: nn.Module, x: Tensor, ranks: tuple[int, ...]) -> None:
    """The rank of an input is one that the layer takes."""
    if not isinstance(x, Tensor):
        raise no_tensor(type(layer).__name__, x)
    if x.dim() in ranks or (not ranks and x.dim() >= 2):
        return
    wanted = "D or ".join(map(str, ranks)) + "D" if ranks else "2D or more"
    raise BatchNormError(
        f"{type(layer).__name__} expected {wanted} input (got {x.dim()}D input of shape "
        f"{tuple(x.shape)}). Add the batch axis with input[None], or build the layer anew: it then "
        "takes any rank from 2."
    )


SET_ASIDE: set[nn.Module] = set()  # the layers whose statistics are a copy at the moment


def recomputing() -> bool:
    """In a backward pass: torch.utils.checkpoint runs the forward pass again."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001  # torch has no public way


def refuse_recomputation(layer: nn.Module) -> None:
    """A layer that normalizes with statistics which move cannot be called again behind its own back."""
    if torch.compiler.is_compiling() or layer in SET_ASIDE:
        return
    if recomputing():
        raise BatchNormError(
            f"{type(layer).__name__} is called again within the backward pass, as a checkpoint does, "
            "and its running statistics, which it normalizes with, have moved: the gradients would be "
            "wrong. Use checkpoint(block, x, use_reentrant=False, context_fn=lambda: "
            "batchnorm.update_once(block)). Where a model makes the checkpoint itself, switch it off "
            "(memory_efficient=False in torchvision's DenseNet), or let nothing move: "
            "batchnorm.freeze(model)."
        )
