"""What the probes measure: functions of a seed and the images that return numbers by name.

Each takes its arm's options by keyword; what they measure is said in the study that names them.
"""

import copy
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm
from batchnorm.errors import BatchNormError
from batchnorm.lab import fitting, networks
from batchnorm.lab.batches import EVALUATION_BATCH, TensorBatches
from batchnorm.lab.data import Images
from batchnorm.lab.evaluation import accuracy_of, evaluate, evaluating
from batchnorm.lab.note import NoteBatchNorm

Numbers = dict[str, Any]

WARM_UP = 5  # steps that no clock counts
TESTED = 2_000  # test images, the first ones
RECALIBRATED = 10_000


def gradient_growth(
    seed: int, _images: None, *, normalized: bool, depth: int, width: int, batch_size: int
) -> Numbers:
    """How the gradient grows towards the input, a factor a layer, in a network at initialization.

    depth × (Linear, BN or nothing, ReLU), Gaussian weights of variance 2/width, without weight and
    bias of the norms. The slope is fitted to log ‖∂L/∂xₗ‖ over the inner layers; L = ⟨x, v⟩ for a
    random v.
    """
    torch.manual_seed(seed)
    x = torch.randn(batch_size, width)
    hidden: list[Tensor] = []
    for _ in range(depth):
        weight = torch.randn(width, width) * math.sqrt(2 / width)
        x = (x @ weight.T).requires_grad_() if not hidden else x @ weight.T
        if normalized:
            x = batchnorm.batch_norm(x, None, None, training=True)
        x = x.relu()
        hidden.append(x)
    gradients = torch.autograd.grad((x * torch.randn_like(x)).sum(), hidden)
    logs = [gradient.norm().log().item() for gradient in gradients]
    inner = logs[2:-2]  # the ends have neighbours on one side alone
    places = [float(place) for place in range(len(inner))]
    slope = statistics.linear_regression(places, inner).slope
    depths = [float(layer) for layer in range(1, depth + 1)]
    return {"growth": math.exp(-slope), "depth": depths, "log_gradient": logs}


def fixed_moments(
    seed: int, images: Images, *, train_images: int, epochs: int, learning_rate: float
) -> Numbers:
    """How far mean and variance of each norm's output are from bias and weight², in a trained LeNet.

    In units of the weight: |mean − bias| / |weight| and |std / |weight| − 1|, the largest over
    layers and channels of one training batch, brightened and dimmed; with the batch's statistics
    and with the running ones.
    """
    model = _trained(seed, images, train_images, epochs, learning_rate)
    batch = images.train_images[:256]
    changed = [batch, batch * 0.5, batch * 2 + 1]
    return {
        "training": max(_moment_error(model.train(), x) for x in changed),
        "evaluation": max(_moment_error(model.eval(), x) for x in changed),
        "plain": _moment_error(model.eval(), batch),
        "weight_spread": _spread(model, "weight"),
        "bias_spread": _spread(model, "bias"),
    }


def _moment_error(model: nn.Module, x: Tensor) -> float:
    worst = 0.0

    def look(layer: nn.Module, _args: Any, y: Tensor) -> None:
        nonlocal worst
        assert isinstance(layer, _BatchNorm)  # noqa: S101  # hooked below
        axes = [axis for axis in range(y.dim()) if axis != 1]
        var_biased, mean = torch.var_mean(y.double(), axes, correction=0)
        scale = layer.weight.double().abs()
        gaps = ((mean - layer.bias).abs() / scale, (var_biased.sqrt() / scale - 1).abs())
        worst = max(worst, *(gap.max().item() for gap in gaps))

    twin = copy.deepcopy(model)  # a training pass would move the running statistics
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(look)
    with torch.no_grad():
        twin(x)
    return worst


def _spread(model: nn.Module, name: str) -> float:
    """Standard deviation over all channels."""
    values = [getattr(m, name).detach() for m in model.modules() if isinstance(m, _BatchNorm)]
    return torch.cat(values).std().item()


def linear(
    seed: int, images: Images, *, train_images: int, epochs: int, learning_rate: float
) -> Numbers:
    """|f(x/2 + z/2) − f(x)/2 − f(z)/2| of a norm, the largest, relative to the largest |f|.

    f is the first norm of a trained LeNet on what the convolution gives it: affine in evaluation;
    in training the statistics are x's own.
    """
    model = _trained(seed, images, train_images, epochs, learning_rate)
    conv, norm = model.get_submodule("conv1"), model.get_submodule("norm1")
    with torch.no_grad():
        x, z = conv(images.train_images[:128]), conv(images.train_images[128:256] * 0.3)
        found = {}
        for mode in ("training", "evaluation"):
            f = copy.deepcopy(norm).train(mode == "training")
            gap = f((x + z) / 2) - (f(x) + f(z)) / 2
            found[mode] = (gap.abs().max() / f(x).abs().max()).item()
    return found


def axes(seed: int, images: Images) -> Numbers:
    """What a norm of images does beside one of features that is given each pixel as a sample.

    `pixels`: the largest difference between BatchNorm2d and BatchNorm1d of (N·H·W, C); `images`:
    the largest difference from statistics of each image by itself (instance norm).
    """
    torch.manual_seed(seed)
    start = 64 * seed % (len(images.train_images) - 63)
    x = nn.Conv2d(1, 6, 5)(images.train_images[start : start + 64]).detach()
    y = batchnorm.BatchNorm2d(6)(x)
    rows = batchnorm.BatchNorm1d(6)(x.movedim(1, -1).reshape(-1, 6))
    as_pixels = rows.reshape(*y.movedim(1, -1).shape).movedim(-1, 1)
    features = torch.randn(64, 5)
    by_hand = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
    return {
        "pixels": (y - as_pixels).abs().max().item(),
        "images": (y - F.instance_norm(x)).abs().max().item(),
        "features": (batchnorm.BatchNorm1d(5)(features) - by_hand).abs().max().item(),
    }


def speed(seed: int, images: Images, *, arm: str, steps: int, batch_size: int) -> Numbers:
    """Examples per second of training LeNet, the median over the steps."""
    model = fitting.start("lenet", arm, seed).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seconds = []
    for step in range(WARM_UP + steps):
        first = step * batch_size % (len(images.train_images) - batch_size + 1)
        inputs = images.train_images[first : first + batch_size]
        labels = images.train_labels[first : first + batch_size]
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {"examples_per_second": batch_size / statistics.median(seconds[WARM_UP:])}


def fast(
    _seed: int,
    images: Images,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    held_out_images: int = 0,
) -> Numbers:
    """Test accuracy of a network of LeNet's size, and the seconds from its making to the number.

    Norms and activations fused, channels_last; SGD with Nesterov momentum 0.9 and weight decay
    5e-4, on a rate that rises for a fifth of the steps and falls to 0; statistics recalibrated at
    the end. With `held_out_images` the accuracy is of those, which are then not trained on.
    """
    start = time.perf_counter()
    model: nn.Module = networks.fast().to(memory_format=torch.channels_last)
    batchnorm.convert(model, fuse=True)
    count = len(images.train_images) - held_out_images
    inputs, labels = images.train_images[:count], images.train_labels[:count]
    steps = epochs * (count // batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, steps, pct_start=0.2, cycle_momentum=False
    )
    model.train()
    for _ in range(epochs):
        for indices in torch.randperm(count).split(batch_size)[: count // batch_size]:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[indices]), labels[indices]).backward()
            optimizer.step()
            scheduler.step()
    batchnorm.recalibrate(model, inputs[:RECALIBRATED].split(EVALUATION_BATCH))
    if held_out_images:
        tested = images.train_images[count:], images.train_labels[count:]
    else:
        tested = images.test_images, images.test_labels
    accuracy = accuracy_of(model, *tested)
    seconds = time.perf_counter() - start
    return {
        "accuracy": accuracy, "seconds": seconds, "parameters": _parameters(model),
    }  # fmt: skip


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def defects(
    seed: int, images: Images, *, train_images: int, epochs: int, learning_rate: float
) -> Numbers:
    """What each defect of the note's layer does, in a LeNet trained with it.

    `accuracy` on test images without gradients, as the note evaluates; `reloaded`: after
    `load_state_dict` into a new network; `with_gradients`: of images one class at a time, in
    `eval()` with gradients on, where the batch's own statistics normalize; `untrained_scale`: what
    an evaluation before training multiplies by; `parameters` of all its norms.
    """
    batches = TensorBatches(images, 64, train_images)
    model = fitting.start("lenet", "batch-note", seed)
    fitting.fit(model, batches, learning_rate, [seed] * epochs)
    other = fitting.start("lenet", "batch-note", seed + 1)
    other.load_state_dict(model.state_dict())
    layers = [m for m in model.modules() if isinstance(m, NoteBatchNorm)]
    with torch.no_grad():
        scale = NoteBatchNorm()(torch.ones(2, 1)).mean().item()
    return {
        "accuracy": _test_accuracy(model, images),
        "reloaded": _test_accuracy(other, images),
        "with_gradients": _accuracy_by_class(model, images),
        "untrained_scale": scale,
        "parameters": sum(p.numel() for layer in layers for p in layer.parameters()),
    }


def _test_accuracy(model: nn.Module, images: Images) -> float:
    return accuracy_of(model, images.test_images[:TESTED], images.test_labels[:TESTED])


def _accuracy_by_class(model: nn.Module, images: Images) -> float:
    """In `eval()`, gradients on, batches of one class: a layer that obeys `eval()` does not mind."""
    twin = copy.deepcopy(model).eval()
    right = 0
    inputs, labels = images.test_images[:TESTED], images.test_labels[:TESTED]
    for label in labels.unique():
        right += int((twin(inputs[labels == label]).argmax(1) == label).sum())
    return right / len(inputs)


def predictiveness(
    seed: int,
    images: Images,
    *,
    arm: str,
    network: str,
    train_images: int,
    learning_rate: float,
    every: int,
    reach: float,
) -> Numbers:
    """How much the loss and the gradient change along the gradient (Santurkar et al. 2018, Fig. 4).

    At every so many steps, on the step's batch: the loss at x − t·g for t up to `reach` times the
    learning rate; `loss_range` is the largest less the smallest, and `gradient_change` the largest
    ‖g(x − t·g) − g(x)‖ / ‖g(x)‖. Means over the steps. And the test accuracy: a network that is
    still at chance has a smooth loss, too.
    """
    batches = TensorBatches(images, 64, train_images)
    model = fitting.start(network, arm, seed)
    inputs, labels = next(batches.train(seed, 1))
    looks: list[int] = []
    ranges: list[float] = []
    changes: list[float] = []

    def look(step: int) -> None:
        if step % every == 0:
            loss_range, change = _along_gradient(model, inputs, labels, learning_rate * reach)
            looks.append(step)
            ranges.append(loss_range)
            changes.append(change)

    fitting.fit(model, batches, learning_rate, [seed], after_step=look)
    if not ranges:
        raise BatchNormError(
            f"predictiveness looks every {every} steps, and there are {batches.steps_per_epoch}. "
            "Give more train_images."
        )
    return {
        "loss_range": statistics.fmean(ranges),
        "gradient_change": statistics.fmean(changes),
        "accuracy": _test_accuracy(model.eval(), images),
        "step": looks,
        "loss_ranges": ranges,
        "gradient_changes": changes,
    }


def _along_gradient(
    model: nn.Module, inputs: Tensor, labels: Tensor, farthest: float
) -> tuple[float, float]:
    twin = copy.deepcopy(model)
    parameters = list(twin.parameters())
    here, first = _loss_and_gradient(twin, parameters, inputs, labels)
    losses, changes, moved = [here], [0.0], 0.0
    size = math.sqrt(sum(float(g.square().sum()) for g in first))
    for share in (0.25, 0.5, 0.75, 1.0):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, first, strict=True):
                parameter.sub_((share * farthest - moved) * gradient)
        moved = share * farthest
        loss, gradients = _loss_and_gradient(twin, parameters, inputs, labels)
        gap = sum(float((g - f).square().sum()) for g, f in zip(gradients, first, strict=True))
        losses.append(loss)
        changes.append(math.sqrt(gap) / size)
    return max(losses) - min(losses), max(changes)


def _loss_and_gradient(
    model: nn.Module, parameters: list[nn.Parameter], inputs: Tensor, labels: Tensor
) -> tuple[float, tuple[Tensor, ...]]:
    loss = F.cross_entropy(model(inputs), labels)
    return loss.item(), torch.autograd.grad(loss, parameters)


PERCENTILES = (1, 5, 15, 25, 35, 50, 65, 75, 85, 95, 99)


def figure_1(
    seed: int,
    images: Images,
    *,
    arm: str,
    train_images: int,
    held_out_images: int,
    steps: int,
    learning_rate: float,
) -> Numbers:
    """Ioffe & Szegedy's Figure 1: an MLP of 3×100 sigmoid units, batch 60, SGD without decay.

    At the start and twenty times: the test accuracy; the 15th, 50th and 85th percentiles of what goes into one
    sigmoid of the last hidden layer (`low`, `middle`, `high`); and the `PERCENTILES` of what goes
    into all of them (`percentile 1`…). `drift`: the standard deviation of the median over the
    second half of training, relative to the mean width from the 15th to the 85th.
    """
    batches = TensorBatches(images, 60, train_images, held_out_images=held_out_images)
    model = fitting.start("mlp", arm, seed)
    seen = images.test_images[:1_000]
    every = max(1, steps // 20)
    epochs = math.ceil(steps / batches.steps_per_epoch)
    looks: list[int] = []
    units: list[list[float]] = []
    layers: list[list[float]] = []
    accuracies: list[float] = []

    def look(step: int) -> None:
        if step % every == 0:
            inputs = _into_the_last_sigmoid(model, seen)
            looks.append(step)
            units.append(_percentiles(inputs[:, 0], (15, 50, 85)))
            layers.append(_percentiles(inputs.flatten(), PERCENTILES))
            accuracies.append(_test_accuracy(model, images))

    look(0)
    fitting.fit(
        model, batches, learning_rate, [seed] * epochs, decays=False, steps=steps, after_step=look
    )
    low, middle, high = (list(column) for column in zip(*units, strict=True))
    late = len(middle) // 2
    width = statistics.fmean(h - w for h, w in zip(high[late:], low[late:], strict=True))
    return {
        "accuracy": accuracies[-1],
        "held_out_accuracy": evaluate(model, batches.held_out(), "cpu")[1],
        "early_accuracy": accuracies[len(accuracies) // 5],
        "drift": statistics.stdev(middle[late:]) / width,
        "step": looks,
        "test_accuracy": accuracies,
        "low": low,
        "middle": middle,
        "high": high,
        **{
            f"percentile {percent}": list(column)
            for percent, column in zip(PERCENTILES, zip(*layers, strict=True), strict=True)
        },
    }


def _into_the_last_sigmoid(model: nn.Module, inputs: Tensor) -> Tensor:
    """What goes into the sigmoids of the last hidden layer, in evaluation: (N, units)."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor], _output: Tensor) -> None:
        kept.append(args[0])

    hook = model.get_submodule("activation3").register_forward_hook(keep)
    with evaluating(model):
        model(inputs)
    hook.remove()
    return kept[0]


def _percentiles(values: Tensor, percents: Sequence[int]) -> list[float]:
    found: list[float] = values.quantile(torch.tensor(percents) / 100).tolist()
    return found


def regularizer(
    seed: int,
    images: Images,
    *,
    train_images: int,
    epochs: int,
    learning_rate: float,
    sizes: Sequence[int],
    rounds: int,
) -> Numbers:
    """What the noise of a batch's statistics adds to the training loss, by the size of the batch.

    excess(M) = mean loss with the statistics of batches of M images − loss with those of all of
    them, at the same weights, those of a trained LeNet: the images are split `rounds` times at
    random. `power` is the slope of log excess over log M; `pull` is Σ weight · ∂excess/∂weight over
    the weights of all norms at the smallest M, relative to the excess there: positive where the
    noise penalizes large weights, and 2 for a penalty ζ · weight² (Luo et al. 2019, Theorem 1).
    """
    largest = max(sizes)
    count = train_images // largest * largest  # so that all sizes see the same images
    model = _trained(seed, images, train_images, epochs, learning_rate)
    inputs, labels = images.train_images[:count], images.train_labels[:count]
    batchnorm.recalibrate(model, inputs.split(EVALUATION_BATCH), exact=True)
    smallest = min(sizes)
    orders = [torch.randperm(count) for _ in range(rounds)]
    pieces = [(inputs, labels)]
    whole, whole_pull = _loss(model.eval(), pieces), _pull(model, pieces)
    with batchnorm.no_update(model.train()):
        excess = [_loss(model, _shuffled(inputs, labels, orders, size)) - whole for size in sizes]
        pull = _pull(model, _shuffled(inputs, labels, orders[:1], smallest)) - whole_pull
    return {
        "power": _power(sizes, excess),
        "pull": pull / excess[sizes.index(smallest)],
        "batch_size": list(sizes),
        "excess_loss": excess,
    }


def _shuffled(
    inputs: Tensor, labels: Tensor, orders: Sequence[Tensor], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for order in orders:
        for indices in order.split(size):
            yield inputs[indices], labels[indices]


def _loss(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over batches of one size."""
    with torch.no_grad():
        losses = [F.cross_entropy(model(inputs), labels).item() for inputs, labels in batches]
    return statistics.fmean(losses)


def _pull(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Σ weight · ∂loss/∂weight of the norms, the mean over batches of one size."""
    weights = [m.weight for m in model.modules() if isinstance(m, _BatchNorm)]
    pulls = []
    for inputs, labels in batches:
        gradients = torch.autograd.grad(F.cross_entropy(model(inputs), labels), weights)
        pairs = zip(weights, gradients, strict=True)
        pulls.append(sum((weight.detach() * gradient).sum().item() for weight, gradient in pairs))
    return statistics.fmean(pulls)


def _power(sizes: Sequence[int], excess: Sequence[float]) -> float:
    """The slope of log excess over log size; NaN where an excess is not positive."""
    if min(excess) <= 0:
        return math.nan
    logs = [math.log(value) for value in excess]
    return statistics.linear_regression([math.log(size) for size in sizes], logs).slope


def _trained(
    seed: int, images: Images, train_images: int, epochs: int, learning_rate: float
) -> nn.Module:
    """A LeNet with batch norm."""
    batches = TensorBatches(images, 64, train_images)
    return fitting.fit(
        fitting.start("lenet", "batch", seed), batches, learning_rate, [seed] * epochs
    )
