"""Rules about the batches that a norm takes its statistics of."""

from collections.abc import Iterator

from torch import nn
from torch.ao.quantization import FakeQuantizeBase, ObserverBase

from batchnorm.checks.dependence import CLOSE
from batchnorm.checks.findings import Level
from batchnorm.checks.rules import Evidence, rule
from batchnorm.checks.subject import Layer, Seen, Subject

FEW = 16


def _perhaps_one_value(subject: Subject) -> Iterator[Evidence]:
    for name, layer in subject.layers.items():
        if isinstance(layer, nn.BatchNorm1d) and layer.training:
            text = "the loader has a batch of 1 sample; on (N, C) inputs that is 1 value"
            yield Evidence(name, text, {"least": 1}, Level.WARNING)


def _by_batch(subject: Subject) -> Iterator[tuple[str, Layer, list[Seen]]]:
    """The layers that normalize by the batch when the model trains, with their calls."""
    for name, layer in subject.layers.items():
        calls = subject.calls(layer)
        if calls and not subject.frozen(layer):
            yield name, layer, calls


@rule(
    "BN006",
    "One value per channel: training will stop there.",
    Level.ERROR,
    remedy="""
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)  # a last batch of one
    model.pool_branch.norm = torch.nn.GroupNorm(32, channels)  # 1×1 behind a pooling
    """,
)
def one_value(subject: Subject) -> Iterator[Evidence]:
    """A batch of one sample and no pixels beside it: one value has no variance, and torch raises.

    Either a batch of the loader holds a single sample (the last one, where the number of samples modulo
    the batch size is 1 and it is not dropped), or a layer behind a pooling to 1×1 gets batches of one. A model in
    evaluation mode is not asked: its loader need not be that of its training.
    """
    loading, probe, seen = subject.loading, subject.probe, subject.training
    for name, layer, calls in _by_batch(subject):
        if not layer.training:
            continue  # these are not the batches of its training
        least = min(calls, key=lambda call: call.values)
        each = least.values // max(least.shape[0], 1)  # values of one sample
        if least.values == 1:
            yield Evidence(
                name, f"an input of shape {least.shape}: 1 value per channel", {"values": 1}
            )
        elif each == 1 and loading is not None and loading.least == 1:
            text = "the loader has a batch of 1 sample, and this layer 1 value of each sample"
            yield Evidence(name, text, {"least": 1})
    if probe is None and loading is not None and loading.least == 1:
        yield from _perhaps_one_value(subject)
    if seen is not None:
        for layer, sizes in seen.values.items():
            if 1 in sizes and layer in subject.names:
                yield Evidence(
                    subject.names[layer], "1 value per channel in training", {"values": 1}
                )


@rule(
    "BN007",
    "Few values per channel: the statistics of a batch are mostly noise.",
    remedy="""
    batchnorm.convert(model, to="sync")  # several devices, or
    batchnorm.convert(model, to="group")  # statistics of each sample, or
    batchnorm.freeze(model)  # for fine-tuning
    """,
)
def few_values(subject: Subject) -> Iterator[Evidence]:
    """Below 16 values per channel in a training batch.

    The mean of n values errs by σ/√n, their standard deviation by about σ/√(2n): at 16 a quarter and
    a sixth of a standard deviation in every channel and every step, and evaluation has none of that
    noise. Wu and He (2018) measured it: accuracy falls from 16 samples a device downwards. Asked of
    layers in training mode only, and in a training of the size that most batches have.
    """
    for name, layer, calls in _by_batch(subject):
        loader = subject.loading.batch_size if subject.loading is not None else None
        values = max(call.values for call in calls)
        size = max(call.shape[0] for call in calls)
        if loader is not None and loader > size:
            values = values // size * loader
        if 1 < values < FEW and layer.training:
            text = f"{values} values per channel (reported below {FEW})"
            yield Evidence(name, text, {"values": values})
    if subject.training is not None:
        for layer in subject.training.values:
            values = subject.training.usual(layer) or 0
            if 1 < values < FEW and layer in subject.names:
                text = f"{values} values per channel in most batches (reported below {FEW})"
                yield Evidence(subject.names[layer], text, {"values": values})


def _shift(first: Seen, other: Seen) -> float | None:
    """√mean((μ₁ − μ₂)² ÷ mean variance): how far two inputs' means are apart."""
    if first.mean is None or other.mean is None:
        return None
    assert first.var_biased is not None  # noqa: S101  # with its mean
    assert other.var_biased is not None  # noqa: S101
    var = (first.var_biased + other.var_biased) / 2
    scaled = (first.mean - other.mean).square() / (var + 1e-12)
    return float(scaled.mean().sqrt())


@rule(
    "BN015",
    "One layer, several inputs of different statistics.",
    needs=("loader",),
    remedy="""
    self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(channels) for _ in range(calls))
    """,
)
def several_calls(subject: Subject) -> Iterator[Evidence]:
    """A layer is called several times in one forward pass, with inputs whose means differ.

    In training each call is normalized by itself; in evaluation all share one running mean, which is
    right for none. Reported where √mean((μ₁ − μ₂)² ÷ σ²) between two calls is above 0.5: half a
    standard deviation. A layer shared between inputs that are alike (a siamese network) is a note.
    """
    if subject.probe is None:
        return
    for name, layer in subject.layers.items():
        batches = [batch for batch in subject.probe.calls.get(layer, []) if len(batch) > 1]
        if not batches:
            continue
        calls = batches[0]
        shifts = [s for other in calls[1:] if (s := _shift(calls[0], other)) is not None]
        worst = max(shifts, default=0.0)
        level = None if worst > 0.5 and not subject.frozen(layer) else Level.NOTE
        text = f"{len(calls)} calls in a pass, their means {worst:.2f} standard deviations apart"
        yield Evidence(name, text, {"calls": len(calls), "shift": worst}, level)


@rule(
    "BN018",
    "Padding in the statistics.",
    needs=("loader",),
    remedy="""
    with batchnorm.masked(model, lengths):
        loss = criterion(model(batch), targets)
    """,
)
def padding(subject: Subject) -> Iterator[Evidence]:
    """Trailing steps of a layer's input repeat the last one, in some samples more than in others.

    That is what padded sequences look like in (N, C, L): mean and variance then depend on how much
    padding a batch happens to have, and evaluation of a single sequence on none. Reported from 5% of
    the steps on, where a variance is already off by about as much.
    """
    for name, _, calls in _by_batch(subject):
        shares = [call.padding for call in calls if call.padding is not None]
        worst = max(shares, default=0.0)
        if worst >= 0.05:
            text = f"{worst:.0%} of the steps are trailing repetitions (reported from 5%)"
            yield Evidence(name, text, {"share": worst})


@rule(
    "BN019",
    "Features on the last axis go into a norm over axis 1.",
    needs=("loader", "graph"),
    remedy="y = norm(x.transpose(1, 2)).transpose(1, 2)  # (N, L, C) -> (N, C, L) and back",
)
def wrong_axis(subject: Subject) -> Iterator[Evidence]:
    """A linear layer or an embedding feeds (N, L, C) into BatchNorm1d, whose channels are axis 1.

    torch raises where L differs from the layer's channels, and is silent where they happen to be
    equal: every step is then normalized as if it were a feature.
    """
    for name, layer in subject.layers.items():
        calls = subject.calls(layer)
        sources = [
            call.source.module for call in subject.traced.calls.get(layer, []) if call.source
        ]
        last = any(isinstance(m, nn.Linear | nn.Embedding | nn.LayerNorm) for m in sources)
        if last and calls and all(len(call.shape) == 3 for call in calls):
            shape = calls[0].shape
            text = f"its input {shape} comes from a layer whose features are the last axis"
            yield Evidence(name, text, {"shape": shape})


@rule(
    "BN021",
    "A mean far from 0 beside the spread: digits are lost.",
    needs=("loader",),
    remedy="images = (images - mean) / std  # normalize the data before the first layer",
)
def far_from_zero(subject: Subject) -> Iterator[Evidence]:
    """|mean| is more than 1,000 standard deviations of a channel.

    float32 holds 7 digits, so x − mean keeps 4 of them; torch's kernel for channels_last keeps none
    from about 10,000 on (measured: at mean 1e4, standard deviation 1, the worst output errs by 3.9).
    From 100 on it is a note. Channels without any spread are BN022's.
    """
    for name, layer in subject.layers.items():
        calls = [call for call in subject.calls(layer) if call.mean is not None]
        if not calls:
            continue
        worst = 0.0
        for call in calls:
            assert call.mean is not None  # noqa: S101  # chosen above
            assert call.var_biased is not None  # noqa: S101
            std = call.var_biased.sqrt()
            alive = std > 1e-6 * call.mean.abs()
            if bool(alive.any()):
                worst = max(worst, float((call.mean.abs() / std)[alive].max()))
        if worst > 100:
            text = f"|mean| is {worst:,.0f} standard deviations in a channel (reported from 1,000)"
            yield Evidence(name, text, {"ratio": worst}, None if worst > 1000 else Level.NOTE)


@rule(
    "BN033",
    "In evaluation an output depends on the rest of its batch.",
    Level.ERROR,
    needs=("loader",),
    remedy="""
    model.eval()  # every layer with running statistics of its own, in buffers:
    torch.nn.BatchNorm2d(channels)  # in place of a hand-written layer or F.batch_norm(training=True)
    """,
)
def batch_dependence(subject: Subject) -> Iterator[Evidence]:
    """The first half of a batch gives other outputs alone than together with the second half.

    Measured in evaluation mode; reported above 1e-3 of the outputs' standard deviation, far above
    what another summation order does in float32. Somewhere statistics of the batch are used: a
    hand-written layer whose switch is not `self.training`, `F.batch_norm(training=True)`, a layer
    without running statistics (BN010). Named is the first module whose outputs differ. It is known
    for a norm by its class, by its call of torch's operator, or because BN(a·x + b) = BN(x); where
    it is none of these, as a head that compares the samples of a batch on purpose, it is a note. A
    model that gives the same batch other outputs in a second pass, as one that draws noise, is not
    compared. Observers of quantization-aware training do it too, on purpose: nothing is said of a
    model that has them.
    """
    probe = subject.probe
    if any(isinstance(m, FakeQuantizeBase | ObserverBase) for m in subject.model.modules()):
        return
    if probe is None or probe.alone is None or probe.alone <= CLOSE:
        return
    text = f"outputs move by {probe.alone:.2g} standard deviations without the batch's second half"
    norm = probe.origin is not None and probe.origin.norm
    if not norm:
        text += ", and no batch norm is seen to do it"
    where = probe.origin.name if probe.origin is not None else ""
    yield Evidence(where, text, {"difference": probe.alone}, None if norm else Level.NOTE)
