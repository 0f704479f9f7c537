"""Other frameworks' batch normalization: to this library's layer, and from it.

All of them compute y = (x − mean) / √(var + eps) · weight + bias in evaluation. They differ in what
momentum weighs, in the running variance's estimator, in names, and in where the channels stand:

    torch    momentum weighs the new batch       running variance unbiased     channels are axis 1
    Keras    the old value, 0.99                 biased                        the last axis, eps 1e-3
    Flax     the old value, 0.99                 biased                        the last axis
    ONNX     the old value, 0.9                  biased                        axis 1
    the note the old value, 0.9                  biased, starts at 0           axis 1

So momentum becomes 1 − momentum both ways. A running variance is carried over as it is, and evaluation
gives the same outputs. With `count`, the values per channel M of the batches that it was averaged over,
it is multiplied by M / (M − 1) on the way in and by (M − 1) / M on the way out: then the layer has what
torch's would have had, and a training that went on here exports what it would have been there. A layer
that goes on with the biased variance is `convert(layer, to="estimator", unbiased=False)`.

An imported layer is a `BatchNorm` of any rank whose channels are axis 1: `x.movedim(-1, 1)` of theirs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import BatchNormError, needed
from batchnorm.layers import BatchNorm
from batchnorm.model.discovery import Norm, activation_of, constant_norms
from batchnorm.variants.estimators import EstimatorBatchNorm
from batchnorm.variants.renorm import RenormBatchNorm

Array: TypeAlias = NDArray[Any]
# Any: Keras, Flax and ONNX are not imported to be read
Foreign: TypeAlias = Any


class State(NamedTuple):
    """What a framework knows of a layer, per channel: (C,) each; momentum weighs the old value."""

    weight: Array | None
    bias: Array | None
    mean: Array
    var_biased: Array
    eps: float
    momentum: float


def from_keras(layer: Foreign, *, count: int | None = None) -> BatchNorm:
    """A built `keras.layers.BatchNormalization` as a `BatchNorm`; see the module for the equation.

    Args:
        layer: of any axis; where it is trained with renorm=True, only evaluation is the same.
        count: values per channel of its batches; see the module.

    Raises:
        BatchNormError: another layer; one that is not built yet; a count below 2.
    """
    _refuse_other(
        layer, "from_keras", ("epsilon", "momentum", "axis"), "keras.layers.BatchNormalization"
    )
    if getattr(layer, "moving_mean", None) is None:
        raise BatchNormError(
            f"from_keras got {layer!r}, which has no variables yet. Call layer.build(shape) first."
        )
    state = State(
        _array(layer.gamma),
        _array(layer.beta),
        _required(layer.moving_mean),
        _required(layer.moving_variance),
        layer.epsilon,
        layer.momentum,
    )
    return _imported(state, count)


def to_keras(
    norm: Norm, *, axis: int = -1, count: int | None = None
) -> tuple[dict[str, Any], list[Array]]:
    """`(config, weights)` for `keras.layers.BatchNormalization(**config)` and its `set_weights`.

    Args:
        norm: with running statistics, torch's or ours.
        axis: of the channels there.
        count: values per channel of its batches; see the module.

    Raises:
        BatchNormError: what has no counterpart: no running statistics, momentum=None; count below 2.
    """
    state = _exported(norm, "to_keras", count)
    config = {
        "axis": axis,
        "momentum": state.momentum,
        "epsilon": state.eps,
        "scale": state.weight is not None,
        "center": state.bias is not None,
    }
    values = (state.weight, state.bias, state.mean, state.var_biased)  # in Keras's order
    return config, [value for value in values if value is not None]


def from_flax(
    variables: Mapping[str, Any],
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    count: int | None = None,
) -> BatchNorm:
    """The variables of a `flax.linen.BatchNorm` as a `BatchNorm`; see the module for the equation.

    Args:
        variables: `{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}` of the one layer;
            params, scale or bias may be missing.
        momentum: of the Flax layer, which weighs the old value there.
        epsilon: of the Flax layer.
        count: values per channel of its batches; see the module.

    Raises:
        BatchNormError: variables without batch_stats of one layer; a count below 2.
    """
    one = (
        'the variables of one layer: {"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}'
    )
    if not isinstance(variables, Mapping):
        raise BatchNormError(
            f"from_flax got a {type(variables).__name__} and wants {one}, as layer.init or "
            "model.init give them."
        )
    found, params = variables.get("batch_stats", {}), variables.get("params", {})
    if not {"mean", "var"} <= set(found):
        raise BatchNormError(
            f"from_flax got the collections {sorted(variables)} with batch_stats {sorted(found)} and "
            f"wants {one}. Of a model's take one layer's from each collection: "
            '{"params": variables["params"]["BatchNorm_0"], '
            '"batch_stats": variables["batch_stats"]["BatchNorm_0"]}.'
        )
    if strange := set(params) - {"scale", "bias"}:
        raise BatchNormError(
            f"from_flax got params with {', '.join(sorted(strange))}, which no flax.linen.BatchNorm "
            f"has, and wants {one}."
        )
    weight, bias = _array(params.get("scale")), _array(params.get("bias"))
    mean, var = _required(found["mean"]), _required(found["var"])
    return _imported(State(weight, bias, mean, var, epsilon, momentum), count)


def to_flax(
    norm: Norm, *, count: int | None = None
) -> tuple[dict[str, Any], dict[str, dict[str, Array]]]:
    """`(options, variables)` for `flax.linen.BatchNorm(use_running_average=…, **options)`.

    Raises:
        BatchNormError: as `to_keras`.
    """
    state = _exported(norm, "to_flax", count)
    options = {
        "momentum": state.momentum,
        "epsilon": state.eps,
        "use_scale": state.weight is not None,
        "use_bias": state.bias is not None,
    }
    affine = {"scale": state.weight, "bias": state.bias}
    params = {name: value for name, value in affine.items() if value is not None}
    return options, {"params": params, "batch_stats": {"mean": state.mean, "var": state.var_biased}}


def from_onnx(model: Foreign, *, count: int | None = None) -> dict[str, BatchNorm]:
    """The BatchNormalization nodes of an `onnx.ModelProto` as layers, by the name of their output.

    Args:
        model: whose scale, bias, mean and variance are initializers, as exporters write them.
        count: values per channel of the batches; see the module.

    Raises:
        BatchNormError: no model, or one without such a node; a node whose values are computed in the
            graph; a count below 2.
        ModuleNotFoundError: onnx is not installed.
    """
    numpy_helper = needed("onnx.numpy_helper", "from_onnx")
    if not hasattr(model, "graph"):
        raise BatchNormError(
            f"from_onnx got a {type(model).__name__} and wants an onnx.ModelProto: onnx.load(path)."
        )
    kinds = {node.op_type for node in model.graph.node}
    if "BatchNormalization" not in kinds:
        raise BatchNormError(
            f"from_onnx got a model of {', '.join(sorted(kinds)) or 'no nodes'}, and wants one with "
            "BatchNormalization in it. An exporter may have folded it into its neighbours: export "
            "without that."
        )
    stored = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    layers = {}
    for node in model.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        if missing := [name for name in node.input[1:5] if name not in stored]:
            raise BatchNormError(
                f"from_onnx: {', '.join(missing)} of the node {node.name or node.output[0]!r} are no "
                "initializers, so they have no values here. Fold constants first."
            )
        own = {attribute.name: attribute.f for attribute in node.attribute}
        eps, momentum = own.get("epsilon", 1e-5), own.get("momentum", 0.9)
        weight, bias, mean, var = (_required(stored[name]) for name in node.input[1:5])
        state = State(weight, bias, mean, var, eps, momentum)
        layers[node.output[0]] = _imported(state, count)
    return layers


def to_onnx(
    norm: Norm, *, rank: int = 4, training: bool = False, count: int | None = None
) -> Foreign:
    """An `onnx.ModelProto` (opset 15) of the one layer: "x": (N, C, *spatial) -> "y".

    Args:
        norm: with running statistics, torch's or ours.
        rank: of x.
        training: with training_mode=1, and the outputs "running_mean" and "running_var".
        count: values per channel of its batches; see the module.

    Raises:
        BatchNormError: as `to_keras`.
        ModuleNotFoundError: onnx is not installed.
    """
    helper, numpy_helper = (
        needed(module, "to_onnx") for module in ("onnx.helper", "onnx.numpy_helper")
    )
    state = _exported(norm, "to_onnx", count)
    ones = np.ones_like(state.mean)
    weight = ones if state.weight is None else state.weight  # ONNX has no batch norm without
    bias = 0 * ones if state.bias is None else state.bias
    values = {"scale": weight, "bias": bias, "mean": state.mean, "var": state.var_biased}
    outputs = ["y", "running_mean", "running_var"] if training else ["y"]
    node = helper.make_node(
        "BatchNormalization", ["x", *values], outputs,
        epsilon=state.eps, momentum=state.momentum, training_mode=int(training),
    )  # fmt: skip
    kind = helper.np_dtype_to_tensor_dtype(state.mean.dtype)
    channels = len(state.mean)
    shape: list[str | int | None] = ["N", channels, *(f"axis{i}" for i in range(2, rank))]
    shapes: dict[str, Sequence[str | int | None]]
    shapes = {"x": shape, "y": shape, "running_mean": [channels], "running_var": [channels]}
    graph = helper.make_graph(
        [node],
        "batch_norm",
        [helper.make_tensor_value_info("x", kind, shapes["x"])],
        [helper.make_tensor_value_info(name, kind, shapes[name]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])


def from_note(layer: Foreign, num_features: int, *, count: int | None = None) -> BatchNorm:
    """The layer of the student's note, or d2l's Chinese edition's, as a `BatchNorm`.

    Args:
        layer: with gamma and beta (one value, or one a channel), moving_mean, moving_var, momentum
            (which weighs the old value; d2l's English edition means the opposite: pass 1 − it) and eps.
        num_features: C, of which a layer with single values knows nothing.
        count: values per channel of its batches; see the module.

    Raises:
        BatchNormError: values that are neither one nor C; a count below 2.
    """
    names = ("gamma", "beta", "moving_mean", "moving_var")
    _refuse_other(layer, "from_note", names, "layer like the note's BatchNorm")
    values = [_required(getattr(layer, name)).reshape(-1) for name in names]
    for name, value in zip(names, values, strict=True):
        if len(value) not in {1, num_features}:
            raise BatchNormError(
                f"from_note got {len(value)} values in {name} and num_features={num_features}, and "
                "wants one value or one a channel."
            )
    eps, momentum = getattr(layer, "eps", 1e-5), getattr(layer, "momentum", 0.9)
    weight, bias, mean, var = (np.broadcast_to(value, (num_features,)) for value in values)
    return _imported(State(weight, bias, mean, var, eps, momentum), count)


def to_note(norm: Norm, *, count: int | None = None) -> dict[str, Any]:
    """The attributes of the note's layer: gamma, beta, moving_mean, moving_var, momentum, eps.

    gamma and beta are (1,) tensors there, one value for all channels.

    Raises:
        BatchNormError: a weight or bias that differs among channels; as `to_keras`.
    """
    state = _exported(norm, "to_note", count)
    single = {}
    for name, own, default in (("gamma", state.weight, 1.0), ("beta", state.bias, 0.0)):
        value = np.full_like(state.mean, default) if own is None else own
        if np.ptp(value):
            raise BatchNormError(
                f"to_note got a layer whose {name} differs among its channels (from {value.min():.3g} "
                f"to {value.max():.3g}), and the note's layer has one value for all of them. Use "
                "batchnorm.BatchNorm there."
            )
        single[name] = torch.from_numpy(value[:1].copy())
    return {
        **single,
        "moving_mean": torch.from_numpy(state.mean),
        "moving_var": torch.from_numpy(state.var_biased),
        "momentum": state.momentum,
        "eps": state.eps,
    }


def _imported(state: State, count: int | None) -> BatchNorm:
    """A layer with torch's conventions."""
    bessel = 1.0 if count is None else _counted(count) / (count - 1)
    dtype = torch.from_numpy(np.array(state.mean)).dtype
    affine = state.weight is not None or state.bias is not None
    norm = BatchNorm(
        len(state.mean), state.eps, 1 - state.momentum, affine=affine, bias=state.bias is not None,
        dtype=dtype,
    )  # fmt: skip
    if affine and state.weight is None:
        norm.weight.requires_grad_(False)  # there is none to train there: it stays 1
    for target, value in (
        (norm.weight, state.weight),
        (norm.bias, state.bias),
        (norm.running_mean, state.mean),
        (norm.running_var, state.var_biased * bessel),
    ):
        if target is not None and value is not None:
            target.data.copy_(torch.from_numpy(np.array(value)))
    return norm


def _exported(norm: Norm, verb: str, count: int | None) -> State:
    """A layer's state in the others' conventions."""
    _refuse_no_norm(norm, verb)
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise BatchNormError(
            f"{verb} got a layer without running statistics, which the others always have. Build it "
            "with track_running_stats=True and recalibrate it."
        )
    if norm.momentum is None:
        raise BatchNormError(
            f"{verb} got a layer with momentum=None, an average over all batches, which the others do "
            "not have. Set layer.momentum, the weight of the new batch, first."
        )
    own = isinstance(norm, EstimatorBatchNorm) and not norm.unbiased
    if count is not None and (own or isinstance(norm, RenormBatchNorm)):
        raise BatchNormError(
            f"{verb} got count={count} for a {type(norm).__name__} whose running variance is biased "
            "already, as the others'. Leave count out."
        )
    bessel = 1.0 if count is None else (_counted(count) - 1) / count
    weight, bias = (None if p is None else _numpy(p) for p in (norm.weight, norm.bias))
    return State(weight, bias, _numpy(mean), _numpy(var) * bessel, norm.eps, 1 - norm.momentum)


def _refuse_other(layer: Foreign, verb: str, names: Sequence[str], wanted: str) -> None:
    if missing := [name for name in names if not hasattr(layer, name)]:
        raise BatchNormError(
            f"{verb} got a {type(layer).__name__} and wants a {wanted}, which has "
            f"{', '.join(missing)}. Pass the layer itself, not the model or another norm."
        )


def _refuse_no_norm(norm: Any, verb: str) -> None:
    """What is exported must be batch normalization, and no more."""
    if isinstance(norm, Norm):
        if norm.running_mean is not None and is_lazy(norm.running_mean):
            raise BatchNormError(
                f"{verb} got a layer that has not learned its size. Run a batch first."
            )
        if isinstance(activation_of(norm), nn.Identity):
            return
        raise BatchNormError(
            f"{verb} got a {type(norm).__name__} with an activation of its own, and wants the norm "
            "alone: the activation would be lost. Copy its state dict into a BatchNorm2d."
        )
    fix = "Pass the batch norms of the model, one by one"
    if isinstance(getattr(norm, "norm", None), Norm):
        fix = "Pass its .norm, and export what else it does by itself"
    elif isinstance(norm, nn.Module) and constant_norms(norm):
        fix = "Convert it first: batchnorm.convert(layer)"
    raise BatchNormError(f"{verb} got a {type(norm).__name__} and wants a batch norm. {fix}.")


def _counted(count: int) -> int:
    if count < 2:
        raise BatchNormError(
            f"got count={count} and wants 2 or more: the values per channel of a batch, N · H · W. One "
            "value has no variance."
        )
    return count


def _numpy(value: Tensor) -> Array:
    wide = value.detach().cpu()
    wide = wide if wide.dtype == torch.float64 else wide.float()  # NumPy has no bfloat16
    array: Array = wide.numpy().copy()
    return array


def _array(value: Foreign) -> Array | None:
    """Of a framework's variable; None for what a layer does not have."""
    if value is None:
        return None
    value = getattr(value, "value", value)  # Keras's variable holds its backend's tensor
    if isinstance(value, Tensor):
        return _numpy(value)
    array = np.asarray(value)
    # JAX's bfloat16 is no dtype of NumPy's own, and torch does not read it
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def _required(value: Foreign) -> Array:
    array = _array(value)
    assert array is not None  # noqa: S101  # the caller looked
    return array
