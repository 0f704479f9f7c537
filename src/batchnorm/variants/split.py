"""Split batch normalization: statistics for each domain by itself, switched by a context."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.errors import BatchNormError
from batchnorm.layers import STATE, BatchNorm, as_leaf
from batchnorm.variants.variant import check_rank, ranks_of, take


class SplitBatchNorm(nn.Module):
    """y = (x − mean_k) / √(var_k + eps) · weight_k + bias_k, for the domain k that is switched on.

    Each domain has a `BatchNorm` of its own, with its own running statistics; mean and var are the
    batch's in training and the domain's running ones in evaluation. weight and bias are each
    domain's own, as in AdvProp, or one Parameter for all (`shared=True`), as in AdaBN.

        with batchnorm.domain(model, "adversarial"):
            loss = loss + criterion(model(perturbed), labels)

    The first domain is on at the start, and evaluates unless another is switched on. The inner layers
    are plain batch norms under `domains`, which every tool finds (a synchronised one replaces them);
    a state dict of a plain norm loads into every domain.

    Use it where batches come from distributions that differ (clean and adversarial, source and target,
    day and night) and each has enough samples. A batch belongs to one domain as a whole. Under DDP with
    weights of their own, pass every domain through the model before the backward pass, or set
    find_unused_parameters.

    Args:
        num_features: C.
        eps: added to the variance, inside the square root.
        momentum: the weight of the new batch, as in torch; None: the average over all batches.
        affine: learn weight and bias.
        track_running_stats: keep running statistics; without, evaluation uses the batch's, too.
        device: where the parameters and buffers are made.
        dtype: of the parameters and buffers.
        bias: with affine: learn the bias.
        domains: their names, one or more.
        shared: one weight and bias for all domains.

    Shapes: (N, C, *spatial), any rank from 2.

    Raises:
        BatchNormError: no domain, or one named twice.

    Source: Xie et al. 2020, https://arxiv.org/abs/1911.09665 (AdvProp); Chang et al. 2019,
    https://arxiv.org/abs/1906.03950 (domain-specific batch normalization).
    """

    options = ("domains", "shared")
    ranks: tuple[int, ...] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        domains: Sequence[str] = ("main", "auxiliary"),
        shared: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(domains, str) or not domains or len(set(domains)) != len(domains):
            raise BatchNormError(
                f"SplitBatchNorm got domains={domains!r} and wants one or more names, each once."
            )
        options = (eps, momentum, affine, track_running_stats, device, dtype)
        self.shared = shared
        for name in domains:
            if "." in name or hasattr(nn.ModuleDict, name):
                raise BatchNormError(
                    f"SplitBatchNorm got a domain {name!r}, which is part of torch.nn.ModuleDict or has a "
                    "dot in it. Name it otherwise."
                )
        self.domain = domains[0]
        self.domains = nn.ModuleDict(
            {name: BatchNorm(num_features, *options, bias=bias) for name in domains}
        )
        if shared:
            self._share()
        self.register_load_state_dict_pre_hook(_of_a_plain_norm)  # type: ignore[no-untyped-call]

    @property
    def norm(self) -> nn.Module:
        """The layer of the domain that is switched on: a `BatchNorm`, or what has replaced it."""
        return self.domains[self.domain]

    def forward(self, input: Tensor, mask: Tensor | None = None, axis: int = 1) -> Tensor:
        """Normalize input: (N, C, *spatial), by the domain that is switched on.

        mask: True where a value counts; axis: where the channels stand. See `batchnorm.batch_norm`.
        """
        if isinstance(input, fx.Proxy):
            leaf: Tensor = as_leaf(self, input, mask, axis)
            return leaf
        check_rank(self, input, self.ranks)
        # what has replaced a domain's norm may know neither
        options = ({} if mask is None else {"mask": mask}) | ({} if axis == 1 else {"axis": axis})
        y: Tensor = self.norm(input, **options)
        return y

    def _share(self) -> None:
        first, *others = self.domains.values()
        for other in others:
            other.weight, other.bias = first.weight, first.bias

    @classmethod
    def of(cls, norm: _NormBase, **options: Any) -> Self:
        """In the place of a norm: the first domain holds its parameters and buffers themselves.

        The other domains start as copies.
        """
        if unknown := set(options) - set(cls.options):
            raise BatchNormError(
                f"SplitBatchNorm got {', '.join(sorted(unknown))} and wants {', '.join(cls.options)}."
            )
        made = cls(norm.num_features, norm.eps, norm.momentum, device="meta", **options)
        made.ranks = ranks_of(norm)
        for place, layer in enumerate(made.domains.values()):
            take(layer, norm)  # type: ignore[arg-type]  # they are batch norms
            if place:
                _own(layer)
        if made.shared:
            made._share()
        return made.train(norm.training)

    def extra_repr(self) -> str:
        """The domain that is on, and what is shared."""
        return f"domain={self.domain!r}, shared={self.shared}"


def _own(layer: nn.Module) -> None:
    """Copies in the place of parameters and buffers that another layer holds, too."""
    for name in STATE:
        value = getattr(layer, name)
        if isinstance(value, nn.Parameter):
            setattr(layer, name, nn.Parameter(value.detach().clone(), value.requires_grad))
        elif value is not None:
            setattr(layer, name, value.clone())


def _of_a_plain_norm(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """weight -> domains.<each>.weight, and so on."""
    assert isinstance(module, SplitBatchNorm)  # noqa: S101  # it is registered there
    for name in STATE:
        if prefix + name in state_dict:
            value = state_dict.pop(prefix + name)
            for domain in module.domains:
                state_dict[f"{prefix}domains.{domain}.{name}"] = value


@contextmanager
def domain(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Inside, every SplitBatchNorm of the model works with the statistics of this domain.

    Contexts may be nested; on the way out each layer has the domain that it had before.

    Args:
        model: a model with SplitBatchNorm in it: built with it, or `convert(model, to="split")`.
        name: a domain that all of them have.

    Yields:
        The model.

    Raises:
        BatchNormError: no such layer in the model; a layer that has no such domain.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SplitBatchNorm)}
    if not layers:
        raise BatchNormError(
            f"domain(model, {name!r}): the model has no SplitBatchNorm. Convert it first: "
            f'batchnorm.convert(model, to="split", domains=("main", {name!r})).'
        )
    for path, layer in layers.items():
        if name not in layer.domains:
            raise BatchNormError(
                f"domain(model, {name!r}): the layer {path} has the domains "
                f"{', '.join(layer.domains)}. Name one of them, or build it with this one."
            )
    before = {layer: layer.domain for layer in layers.values()}
    try:
        for layer in layers.values():
            layer.domain = name
        yield model
    finally:
        for layer, old in before.items():
            layer.domain = old
