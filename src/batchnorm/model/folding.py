"""Fold batch normalization into its neighbours: in evaluation it is one affine map per channel.

    y = a · x + c,    a = weight / √(running_var + eps),    c = bias − a · running_mean

Behind a convolution, a linear layer or another norm, a and c go into that layer's weight and bias;
before a convolution or a linear layer they go into the next one's, where that is exact. Everything
is computed in float64 and written in the layer's own dtype.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from batchnorm.errors import BatchNormError, brief
from batchnorm.model import account
from batchnorm.model.account import Change
from batchnorm.model.calling import eagerly, feed, tensors
from batchnorm.model.conversion import exchange
from batchnorm.model.discovery import (
    activation_of,
    batch_norms,
    constant_norms,
    refuse_no_model,
    uncompiled,
)
from batchnorm.model.tracing import Call, Traced, trace
from batchnorm.variants.variant import ranks_of

UNPROVEN = "parts could not be traced; pass inputs= to have calls counted and outputs compared"
TOLERANCE = 1e-9  # of the outputs' scale, in float64: what rounding may do through a deep network


class Unfoldable(Exception):  # noqa: N818  # a reason, told in the account
    """Why a layer stays."""


def fold(model: nn.Module, inputs: Any = None) -> nn.Module:
    """A copy of the model, in evaluation mode, without the batch norm that can be folded away.

    Which layer feeds which is read from the traced graph. Where control flow forbids tracing, the
    parts that can be traced are; what stays is named in `changes`, with the reason. The copy has the
    model's own classes, with `nn.Identity` (or the activation that belonged to the layer) where a
    norm was.

    Args:
        model: in evaluation mode; it is not changed.
        inputs: sample inputs, a tensor, a tuple of arguments, or a dict of keyword arguments. With
            them the outputs of model and copy are compared, in the model's dtype and in float64,
            and `changes(copy).facts` has the largest differences and the largest output; linear layers, whose channel axis
            depends on the rank of the input, are folded only with them.

    Returns:
        The copy. `changes` of it names what was folded into what, and what was left and why.

    Raises:
        BatchNormError: a model in training mode; outputs that differ by more than rounding.
    """
    refuse_no_model(model, "fold")
    if model.training:
        raise BatchNormError(
            f"fold got {type(model).__name__} in training mode, where a norm depends on the batch. "
            "Call model.eval() first; to go on training, keep the unfolded model."
        )
    model = uncompiled(model)
    folded = _copy(model)
    folding = _Folding(folded, trace(folded), _ranks(folded, inputs))
    entries = list(folding.fold_all())
    facts = _proof(model, folded, inputs) if inputs is not None else {}
    if inputs is None and folding.traced.untraced:
        account.log.warning("fold: %s", UNPROVEN)
        facts["not_compared"] = UNPROVEN
    return account.record(folded, "fold", entries, **facts)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, ValueError) as error:
        raise BatchNormError(
            f"fold works on a copy, and {type(model).__name__} cannot be copied ({brief(error)}). "
            "Make pruning and weight norm permanent first (prune.remove, remove_weight_norm), and "
            "run a batch through lazy layers."
        ) from error


@dataclass
class _Affine:
    """a and c of y = a · x + c, in float64: (C,) each."""

    a: Tensor
    c: Tensor


@dataclass
class _Seen:
    """What the sample inputs showed of a module: the ranks of its inputs, and its calls."""

    ranks: set[int]
    calls: int = 0


class _Folding:
    """One copy at work."""

    def __init__(
        self, model: nn.Module, traced: Traced, seen: dict[nn.Module, _Seen] | None
    ) -> None:
        self.model, self.traced, self.seen = model, traced, seen
        self.names = {module: name for name, module in model.named_modules()}
        self.norms = {**batch_norms(model), **constant_norms(model)}

    def fold_all(self) -> Iterator[Change]:
        for name, norm in self.norms.items():
            try:
                neighbour = self._fold(norm)
            except Unfoldable as reason:
                yield Change(name, done=False, what=str(reason))
            else:
                yield Change(name, done=True, what=f"folded into {self.names[neighbour]}")

    def _fold(self, norm: nn.Module) -> nn.Module:
        """Into the layer before it or, failing that, the one behind it."""
        _refuse_norm(norm)
        self._refuse_opened(norm)
        calls = self._calls(norm)
        try:
            before = self._one([call.source for call in calls], "before it")
            return self._fold_into_the_layer_before(norm, before)
        except Unfoldable as reason:
            try:
                return self._fold_into_the_layer_behind(norm, calls)
            except Unfoldable as other:
                raise Unfoldable(f"{reason}; {other}") from None

    def _calls(self, norm: nn.Module) -> list[Call]:
        calls = self.traced.calls.get(norm, [])
        if not calls:
            idle = self.seen is not None and norm not in self.seen
            raise Unfoldable("not called" if idle else "not in what could be traced")
        self._refuse_calls_outside(norm)
        return calls

    def _refuse_opened(self, module: nn.Module) -> None:
        """Whoever reads a weight by itself would read the folded one."""
        if module in self.traced.opened:
            raise Unfoldable(
                f"the parameters of {self.names[module]} are read by the code around it"
            )

    def _refuse_calls_outside(self, module: nn.Module) -> None:
        """Called more often than the graph shows: from control flow, or by a parent's own code."""
        if self.seen is None:
            return
        traced = len(self.traced.calls.get(module, []))
        seen = self.seen[module].calls if module in self.seen else 0
        if seen not in {0, traced}:
            raise Unfoldable(f"called {seen} times, {traced} of them in what could be traced")

    def _one(self, found: list[Call | None], where: str) -> nn.Module:
        """The one module that stands there in every call, and nowhere else."""
        modules = {call.module for call in found if call is not None}
        if None in found or len(modules) != 1:
            raise Unfoldable(f"no single layer {where} that feeds it alone")
        (module,) = modules
        if len(self.traced.calls[module]) != len(found):
            raise Unfoldable(f"{self.names[module]} {where} is called elsewhere, too")
        self._refuse_calls_outside(module)
        self._refuse_opened(module)
        return module

    def _fold_into_the_layer_before(self, norm: nn.Module, layer: nn.Module) -> nn.Module:
        _refuse_neighbour(layer, self.names[layer])
        affine = _affine(norm)
        self._refuse_axis(layer, norm)
        _refuse_channels(_channels_out(layer), affine)
        _refuse_another_map(layer, affine)
        _scale_output(layer, affine)
        self._replace(norm, activation_of(norm))
        return layer

    def _fold_into_the_layer_behind(self, norm: nn.Module, calls: list[Call]) -> nn.Module:
        if type(activation_of(norm)) is not nn.Identity:
            raise Unfoldable("an activation of its own stands behind it")
        users = [call for calls in self.traced.calls.values() for call in calls]
        behind = [call for call in users if call.source is not None and call.source in calls]
        if any(call.users != 1 for call in calls) or len(behind) != len(calls):
            raise Unfoldable("its output is used by something else than one layer behind it")
        (layer, *others) = {call.module for call in behind}
        if others or len(self.traced.calls[layer]) != len(behind):
            raise Unfoldable(f"{self.names[layer]} behind it is called elsewhere, too")
        _refuse_neighbour(layer, self.names[layer])
        if isinstance(layer, _BatchNorm | _ConvTransposeNd):
            raise Unfoldable(f"a {type(layer).__name__} behind it takes nothing in")
        self._refuse_calls_outside(layer)
        self._refuse_opened(layer)
        affine = _affine(norm)
        self._refuse_axis(layer, norm)
        _refuse_channels(_channels_in(layer), affine)
        replacement = _take_padding(layer, affine)
        _scale_input(layer, affine)
        self._replace(norm, replacement)
        return layer

    def _refuse_axis(self, layer: nn.Module, norm: nn.Module) -> None:
        """A linear layer's features are the last axis, a norm's channels axis 1."""
        if not isinstance(layer, nn.Linear):
            return
        if self.seen is None:
            raise Unfoldable(
                f"{self.names[layer]} is linear, and whether its features are the norm's channels "
                "depends on the rank of the input: pass inputs="
            )
        ranks = self.seen[norm].ranks if norm in self.seen else set()
        if ranks != {2}:
            raise Unfoldable(f"{self.names[layer]} is linear, and its input is not (N, C)")

    def _replace(self, norm: nn.Module, replacement: nn.Module) -> None:
        self._rewire(norm, replacement)
        replacement.train(norm.training)
        exchange(self.model, {norm: replacement})

    def _rewire(self, norm: nn.Module, replacement: nn.Module) -> None:
        """Keep the traced calls true: other norms are still to be folded."""
        calls = self.traced.calls.pop(norm)
        self.names[replacement] = self.names[norm]
        if not isinstance(replacement, nn.Identity):
            for call in calls:
                call.module = replacement
            self.traced.calls[replacement] = calls
            return
        for user in (call for calls in self.traced.calls.values() for call in calls):
            if user.source in calls:
                user.source = user.source.source
        for call in calls:
            if call.source is not None:
                call.source.users = call.users


def _affine(norm: Any) -> _Affine:
    """Of torch's layers, their subclasses, and frozen kinds with eps 1e-5 where they have none."""
    eps = getattr(norm, "eps", 1e-5)
    a = 1 / (norm.running_var.double() + eps).sqrt()
    if norm.weight is not None:
        a = a * norm.weight.detach().double()
    c = -a * norm.running_mean.double()
    if norm.bias is not None:
        c = c + norm.bias.detach().double()
    return _Affine(a, c)


def _refuse_norm(norm: Any) -> None:
    if norm.training:
        raise Unfoldable("in training mode: it depends on the batch")
    if norm.running_mean is None or norm.running_var is None:
        raise Unfoldable("keeps no running statistics: it depends on the batch in evaluation, too")
    if is_lazy(norm.running_mean):
        raise Unfoldable("has not learned its size: run a batch first")
    _refuse_attachments(norm, "it")
    with torch.no_grad():
        x = torch.randn(2, len(norm.running_mean), *_spatial(norm), dtype=torch.float64)
        twin = copy.deepcopy(norm).double().cpu()
        affine = _affine(twin)
        shape = [1, -1] + [1] * (x.dim() - 2)
        expected = activation_of(twin)(x * affine.a.view(shape) + affine.c.view(shape))
        if not _same(twin(x), expected):
            raise Unfoldable(f"a {type(norm).__name__} computes something else than batch norm")


def _spatial(norm: nn.Module) -> list[int]:
    if ranks := ranks_of(norm):
        return [2] * (ranks[0] - 2)
    return [2, 2]


def _refuse_neighbour(layer: nn.Module, name: str) -> None:
    if not isinstance(layer, _ConvNd | nn.Linear | _BatchNorm):
        raise Unfoldable(f"{name} beside it is a {type(layer).__name__}")
    if isinstance(layer, _BatchNorm):
        _refuse_norm(layer)
        if type(activation_of(layer)) is not nn.Identity:
            raise Unfoldable(f"{name} beside it has an activation of its own")
    _refuse_attachments(layer, name)


def _refuse_attachments(module: nn.Module, name: str) -> None:
    """A hook would see other values, a parametrization would write its own weight again."""
    if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001  # torch has no public way
        raise Unfoldable(f"{name} has forward hooks")
    if parametrize.is_parametrized(module):
        raise Unfoldable(f"{name} is parametrized: call remove_parametrizations first")


def _refuse_channels(channels: int, affine: _Affine) -> None:
    if channels != len(affine.a):
        raise Unfoldable(f"{channels} channels beside it, {len(affine.a)} of its own")


def _channels_out(layer: Any) -> int:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return int(layer.num_features if isinstance(layer, _BatchNorm) else layer.out_channels)


def _channels_in(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def _scale_output(layer: Any, affine: _Affine) -> None:
    """layer(x) ← a · layer(x) + c, by its weight and bias."""
    if isinstance(layer, _BatchNorm):
        own = _affine(layer)
        # a · (own.a · x + own.c) + c, with the running statistics that the layer has
        scale = (layer.running_var.double() + layer.eps).sqrt()  # type: ignore[union-attr]  # checked
        weight = affine.a * own.a * scale
        bias = affine.a * own.c + affine.c + affine.a * own.a * layer.running_mean.double()  # type: ignore[union-attr]
        _set(layer, weight, bias)
        layer.affine = True
        return
    bias = torch.zeros_like(affine.c) if layer.bias is None else layer.bias.detach().double()
    _set(layer, _by_output(layer, affine.a), affine.a * bias + affine.c)


def _by_output(layer: Any, a: Tensor) -> Tensor:
    """The weight with each output channel multiplied."""
    weight: Tensor = layer.weight.detach().double()
    if not isinstance(layer, _ConvTransposeNd):
        return weight * a.view(-1, *[1] * (weight.dim() - 1))
    # (in, out / groups, *kernel): the outputs of a group lie behind the inputs of the group
    grouped = weight.view(layer.groups, -1, *weight.shape[1:])
    scale = a.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
    return (grouped * scale).reshape(weight.shape)


def _scale_input(layer: Any, affine: _Affine) -> None:
    """layer(x) ← layer(a · x + c): exact where no padding stands between."""
    weight = layer.weight.detach().double()
    groups = getattr(layer, "groups", 1)
    # (out, in / groups, *kernel): each group of outputs sees its own inputs
    shape = (groups, 1, -1, *[1] * (weight.dim() - 2))
    grouped = weight.view(groups, -1, *weight.shape[1:])
    constant = (grouped * affine.c.view(shape)).flatten(2).sum(2).flatten()
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    _set(layer, (grouped * affine.a.view(shape)).reshape(weight.shape), constant + bias)


def _take_padding(layer: Any, affine: _Affine) -> nn.Module:
    """Zeros around a · x + c are −c / a around x: a padding layer takes the convolution's."""
    if isinstance(layer, nn.Linear):
        return nn.Identity()
    padding = layer.padding
    if padding == "valid" or (isinstance(padding, tuple) and not any(padding)):
        return nn.Identity()
    if layer.padding_mode != "zeros":
        return nn.Identity()  # it pads with what is there: a · x + c of the same places
    if not bool((affine.a != 0).all()):
        raise Unfoldable("padded zeros behind a scale of 0 have no counterpart before it")
    if isinstance(padding, str):
        raise Unfoldable(f"the layer behind it pads {padding!r}")
    sides = [side for size in reversed(padding) for side in (size, size)]
    layer.padding = tuple(0 for _ in padding)
    layer._reversed_padding_repeated_twice = [0] * len(sides)  # noqa: SLF001  # torch's copy of it
    return ChannelPad((-affine.c / affine.a).to(layer.weight.dtype), sides)


class ChannelPad(nn.Module):
    """Pad (N, C, *spatial) with a constant of its own in each channel."""

    values: Tensor

    def __init__(self, values: Tensor, sides: list[int]) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.sides = sides

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) -> (N, C, *padded)."""
        values = self.values.view(1, -1, *[1] * (x.dim() - 2))
        return nn.functional.pad(x - values, self.sides) + values


def _set(layer: Any, weight: Tensor, bias: Tensor) -> None:
    """New parameters: the old ones may be shared with a layer that is not folded."""
    like = layer.weight if layer.weight is not None else layer.running_mean
    required = layer.weight is not None and layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(like.dtype), requires_grad=required)
    layer.bias = nn.Parameter(bias.to(like.dtype), requires_grad=required)


def _refuse_another_map(layer: Any, affine: _Affine) -> None:
    """A subclass may do more than its weight says (standardize it, for one): try it in float64."""
    layer, affine = copy.deepcopy(layer).double().cpu(), _Affine(affine.a.cpu(), affine.c.cpu())
    with torch.no_grad():
        x = _sample(layer)
        y = layer(x)
        shape = [1, -1] + [1] * (y.dim() - 2)
        expected = y * affine.a.view(shape) + affine.c.view(shape)
        _scale_output(layer, affine)
        if not _same(layer(x), expected):
            raise Unfoldable(f"the {type(layer).__name__} before it does more than its weight says")


def _sample(layer: Any) -> Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(3, layer.in_features, dtype=torch.float64)
    if isinstance(layer, _BatchNorm):
        return torch.randn(3, layer.num_features, *_spatial(layer), dtype=torch.float64)
    sizes = [d * (k - 1) + 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return torch.randn(2, layer.in_channels, *sizes, dtype=torch.float64)


def _same(y: Tensor, expected: Tensor) -> bool:
    return bool((y - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())))


def _ranks(model: nn.Module, inputs: Any) -> dict[nn.Module, _Seen] | None:
    """Run the sample inputs, and note what goes into each layer and how often."""
    if inputs is None:
        return None
    seen: dict[nn.Module, _Seen] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        entry = seen.setdefault(module, _Seen(set()))
        entry.calls += 1
        entry.ranks |= {value.dim() for value in values[:1]}

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        _outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors among the outputs."""
    with torch.no_grad(), eagerly():
        return tensors(feed(model, inputs))


def _proof(model: nn.Module, folded: nn.Module, inputs: Any) -> dict[str, Any]:
    """The largest differences of the outputs: in the model's dtype, and in float64."""
    own = _difference(_outputs(model, inputs), _outputs(folded, inputs))
    doubled = pytree.tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, inputs
    )
    exact = _outputs(copy.deepcopy(model).double(), doubled)
    # folded anew: the copy's weights are rounded to the model's dtype
    twin = copy.deepcopy(model).double()
    list(_Folding(twin, trace(twin), _ranks(twin, doubled)).fold_all())
    difference = _difference(exact, _outputs(twin, doubled))
    scale = max([0.0, *(float(y.abs().max()) for y in exact if y.numel())])
    if not difference <= TOLERANCE * max(1.0, scale):
        raise BatchNormError(
            f"fold: in float64 the folded model's outputs differ by {difference:.2g}, more than "
            "rounding. Nothing was changed; please report the model."
        )
    return {"difference": own, "difference_in_float64": difference, "largest_output": scale}


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    if [y.shape for y in ours] != [y.shape for y in theirs]:
        return float("inf")
    gaps = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return max([0.0, *gaps])
