"""What a layer does in training with one value per channel, which has no variance."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BatchNormError
from batchnorm.model import account
from batchnorm.model.account import Change, log
from batchnorm.model.discovery import SYNCHRONISED, Norm, matching, refuse_no_model
from batchnorm.model.mixing import Mixin, mix, unmix
from batchnorm.variants.variant import Variant


class Lenient(Mixin, _BatchNorm):
    """A mixin, put before a layer's own class: a single value takes the running statistics."""

    _single: str | None  # the layer's name, until it has been said

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalize; one value per channel as in evaluation."""
        several = not isinstance(input, Tensor) or input.numel() != self.num_features
        if several or not self.training:
            y: Tensor = super().forward(input, *args, **kwargs)
            return y
        if self._single is not None:
            log.warning(
                "%s: one value per channel in training, shape %s; normalized with the running "
                "statistics, which stay",
                self._single or "the layer",
                tuple(input.shape),
            )
            self._single = None
        self.training = False
        try:
            y = super().forward(input, *args, **kwargs)
        finally:
            self.training = True
        return y


def single_values(
    model: nn.Module, use: str = "running", pattern: str | Sequence[str] = "*"
) -> nn.Module:
    """Choose what training does with one value per channel, as a last batch of one has; in place.

        y = (x − running_mean) / √(running_var + eps) · weight + bias

    in place of torch's error. The running statistics stay as they are. It is said once a layer. The
    gradient is that of evaluation: the statistics are constants.

    Args:
        model: any model with batch norm in it.
        use: "running" for the running statistics, "error" for torch's error again.
        pattern: which layers, by name, with * and ?; or several patterns.

    Returns:
        The model. `changes(model)` names the layers, and those that were left.

    Raises:
        BatchNormError: another choice.
    """
    refuse_no_model(model, "single_values")
    if use not in {"running", "error"}:
        raise BatchNormError(
            f'single_values got use={use!r} and wants "running" (the running statistics) or "error" '
            "(torch's error)."
        )
    entries = [
        Change(name, **_set(name, layer, lenient=use == "running"))
        for name, layer in matching(model, pattern)
    ]
    return account.record(model, "single_values", entries, use=use)


def _set(name: str, layer: Norm, *, lenient: bool) -> dict[str, Any]:
    if isinstance(layer, Variant):
        return {"done": False, "what": f"a {type(layer).__name__}, which has a rule of its own"}
    if layer.running_mean is None:
        return {"done": False, "what": "keeps no running statistics to use"}
    if isinstance(layer, SYNCHRONISED):
        return {"done": False, "what": "takes the values of all processes"}
    if lenient == isinstance(layer, Lenient):
        return {"done": False, "what": "did so already"}
    if isinstance(layer, Lenient):
        unmix(layer, Lenient)
        del layer._single  # noqa: SLF001  # our own
        return {"done": True, "what": "raises for one value per channel"}
    mix(Lenient, layer)
    assert isinstance(layer, Lenient)  # noqa: S101  # for the type checker
    layer._single = name  # noqa: SLF001  # our own
    return {"done": True, "what": "takes the running statistics for one value per channel"}
