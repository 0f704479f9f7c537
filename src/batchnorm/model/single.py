"""What a layer does in training with one value per channel, which has no variance."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.errors import BatchNormError
from batchnorm.model import account
from batchnorm.model.account import Change, log
from batchnorm.model.discovery import Norm, matching, refuse_no_model
from batchnorm.model.mixing import Mixin, mix, unmix
from batchnorm.variants.sync import OneValue, SyncBatchNorm, several


class Lenient(Mixin, _NormBase):
    """A mixin, put before a layer's own class: a single value takes the running statistics."""

    _single: str | None  # the layer's name, until it has been said

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalize; one value per channel as in evaluation."""
        one = isinstance(input, Tensor) and input.numel() == self.num_features
        # of a synchronised layer all processes find it together, after they have said what they hold;
        # and in an accumulate, which stands in for `normalize`, the micro-batches
        together = isinstance(self, SyncBatchNorm) and several(self.process_group)
        together = together or "normalize" in vars(self)
        if self.training and one and not together:
            return self._evaluate(input, *args, **kwargs)
        try:
            y: Tensor = super().forward(input, *args, **kwargs)
        except OneValue:
            return self._evaluate(input, *args, **kwargs)
        return y

    def _evaluate(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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
            y: Tensor = super().forward(input, *args, **kwargs)
        finally:
            self.training = True
        return y


def single_values(
    model: nn.Module, use: str = "running", pattern: str | Sequence[str] = "*"
) -> nn.Module:
    """Choose what training does with one value per channel, as a last batch of one has; in place.

        y = (x − running_mean) / √(running_var + eps) · weight + bias

    in place of torch's error. The running statistics stay as they are. It is said once a layer. The
    gradient is that of evaluation: the statistics are constants. The family's members do so, too; of
    a `SyncBatchNorm` it is the one value that all processes have together.

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
    if layer.running_mean is None:
        return {"done": False, "what": "keeps no running statistics to use"}
    if isinstance(layer, nn.SyncBatchNorm):
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
