"""Calls of the family's members: masks and axes, batches that are empty, checkpoints, keywords."""

import copy
from functools import partial

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import BatchNormError

MEMBERS = {
    "ghost": partial(batchnorm.GhostBatchNorm, ghost_size=4),
    "renorm": partial(batchnorm.RenormBatchNorm, warmup=0, r_steps=0, d_steps=0, r_max=1.2),
    "split": batchnorm.SplitBatchNorm,
    "biased": partial(batchnorm.EstimatorBatchNorm, unbiased=False, average="debiased"),
    "cumulative": partial(batchnorm.EstimatorBatchNorm, average="cumulative"),
    "frozen": batchnorm.FrozenBatchNorm,
    "sync": batchnorm.SyncBatchNorm,
    "ours": batchnorm.BatchNorm,
    "average": partial(batchnorm.BatchNorm, momentum=None),
}
EVERY = pytest.mark.parametrize("kind", MEMBERS)
TRAINED = pytest.mark.parametrize("kind", [k for k in MEMBERS if k not in {"ghost", "frozen"}])


def made(kind):
    torch.manual_seed(0)
    layer = MEMBERS[kind](3).double()
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    return layer


def images(count=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 5, 4, generator=generator, dtype=torch.float64) * 2 + 1


def same_state(mine, other):
    torch.testing.assert_close(mine.state_dict(), other.state_dict(), rtol=1e-12, atol=1e-12)


@EVERY
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axis", [-1, 2, 0])
def test_an_axis_is_the_moved_input(kind, training, axis):
    layer, twin = made(kind).train(training), made(kind).train(training)
    x, moved = images().requires_grad_(), images().movedim(1, axis).requires_grad_()
    y, expected = layer(moved, axis=axis), twin(x)
    torch.testing.assert_close(y.movedim(axis, 1), expected, rtol=1e-12, atol=1e-12)
    y.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(moved.grad.movedim(axis, 1), x.grad, rtol=1e-10, atol=1e-10)
    same_state(layer, twin)


@TRAINED
@pytest.mark.parametrize("axis", [1, -1])
def test_a_mask_is_the_packed_values(kind, axis):
    layer, twin = made(kind), made(kind)
    for seed in range(2):
        keep = torch.rand(9, 5, 4, generator=torch.Generator().manual_seed(seed)) < 0.6
        x = images(seed=seed)
        packed = x.movedim(1, -1)[keep].requires_grad_()
        expected = twin(packed)
        x = x.movedim(1, axis)
        x = torch.where(keep.unsqueeze(axis), x, torch.nan).requires_grad_()
        y = layer(x, mask=keep, axis=axis)
        values = y.movedim(axis, -1)
        torch.testing.assert_close(values[keep], expected, rtol=1e-10, atol=1e-10)
        assert not values[~keep].any()
        y.pow(3).sum().backward()
        expected.pow(3).sum().backward()
        gradient = x.grad.movedim(axis, -1)
        torch.testing.assert_close(gradient[keep], packed.grad, rtol=1e-9, atol=1e-9)
        assert not gradient[~keep].any()
        same_state(layer, twin)


@EVERY
def test_in_evaluation_every_member_takes_a_mask(kind):
    layer, x = made(kind).eval(), images()
    keep = torch.rand(9, 5, 4) < 0.6
    expected = layer(x) * keep[:, None]
    torch.testing.assert_close(layer(x, mask=keep), expected, rtol=1e-12, atol=1e-12)


def test_ghost_batches_take_no_mask_in_training():
    with pytest.raises(BatchNormError, match=r"GhostBatchNorm got a mask in training .* convert"):
        made("ghost")(images(), mask=torch.ones(9, 5, 4, dtype=torch.bool))


@TRAINED
@pytest.mark.parametrize("left", [0, 1])
def test_a_batch_that_a_mask_empties_does_not_count(kind, left):
    layer, twin = made(kind), made(kind)
    keep = torch.zeros(9, 5, 4, dtype=torch.bool)
    keep[0, 0, :left] = True  # one value has no variance
    for seed in range(3):
        layer(images(seed=seed))
        twin(images(seed=seed))
        assert layer(images(), mask=keep).isfinite().all()
        same_state(layer, twin)


@TRAINED
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(("left", "count"), [(1, 0), (2, 1)])
def test_a_batch_counts_where_a_mask_leaves_a_channel_two_values(kind, axis, left, count):
    layer, keep = made(kind), torch.zeros(9, 3, 5, 4, dtype=torch.bool)
    keep[0, :, 0, 0] = keep[:left, 0, 0, 0] = True
    layer(images().movedim(1, axis), mask=keep.movedim(1, axis), axis=axis)
    counter = next(b for name, b in layer.named_buffers() if "num_batches" in name)
    assert counter == count


@pytest.mark.parametrize("kind", ["biased", "cumulative", "renorm", "average"])
def test_a_channel_that_a_mask_empties_stays(kind):
    layer, twin = made(kind), made(kind)
    keep = torch.ones(9, 3, 5, 4, dtype=torch.bool)
    keep[:, 1] = False
    layer(images(), mask=keep)
    before = made(kind)
    twin(images())
    assert layer.num_batches_tracked == before.num_batches_tracked + 1
    for name in ("running_mean", "running_var"):
        mine, other, old = (getattr(each, name) for each in (layer, twin, before))
        torch.testing.assert_close(mine[[0, 2]], other[[0, 2]])
        assert mine[1] == old[1]


@pytest.mark.parametrize("kind", ["average", "cumulative", "sync"])
def test_an_empty_batch_has_no_part_in_the_average(kind):
    layer, twin = made(kind), made(kind)
    layer.momentum = twin.momentum = None
    for seed in range(2):
        layer(images(0))
        layer(images(seed=seed))
        twin(images(seed=seed))
    same_state(layer, twin)


def test_a_frozen_layer_that_moves_does_not_count_it_either():
    layer = batchnorm.freeze(batchnorm.BatchNorm(3, momentum=None).double(), update=True)
    nothing = torch.zeros(9, 5, 4, dtype=torch.bool)
    layer(images(), mask=nothing)
    assert layer.num_batches_tracked == 0
    layer(images())
    torch.testing.assert_close(layer.running_mean, images().mean((0, 2, 3)))


@EVERY
def test_an_axis_that_is_not_there_is_said(kind):
    with pytest.raises((BatchNormError, IndexError), match=r"axis|Dimension"):
        made(kind)(images(), axis=4)


@EVERY
def test_tracing_keeps_mask_and_axis(kind):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = made(kind)

        def forward(self, x, keep):
            return self.norm(x, mask=keep, axis=-1)

    model = Masked().eval()
    keep = torch.rand(9, 5, 4) < 0.5
    x = images().movedim(1, -1)
    traced = fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 1
    torch.testing.assert_close(traced(x, keep), model(x, keep))


@pytest.mark.parametrize("kind", ["renorm", "biased", "average", "split"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_compile_into_one_graph(kind, dynamic):
    torch.compiler.reset()  # which counts the graphs of all layers together
    layer, twin = made(kind), made(kind)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    keep = torch.rand(9, 5, 4) < 0.5
    for count in (9, 6):
        y = compiled(images(count), mask=keep[:count])
        torch.testing.assert_close(y, twin(images(count), mask=keep[:count]))
        torch.testing.assert_close(compiled(images(count)), twin(images(count)))
    same_state(layer, twin)


# renormalization under activation checkpointing


def block(kind="renorm"):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 3, 1), made(kind), nn.ReLU(), nn.Conv2d(3, 3, 1), made(kind)]
    return nn.Sequential(*layers, layers[1]).double()  # the first norm is called twice


def step(model, run):
    """Two micro-batches, then their gradients: the recomputation comes behind both."""
    inputs = [images(seed=seed).requires_grad_() for seed in range(2)]
    losses = [run(model, x).pow(3).mean() for x in inputs]
    sum(losses).backward()
    return [x.grad for x in inputs], {n: p.grad for n, p in model.named_parameters()}


def checkpointed(model, x):
    once = partial(batchnorm.update_once, model)
    return checkpoint(model, x, use_reentrant=False, context_fn=once)


def frozen_and_moving(model):
    return batchnorm.freeze(model, update=True)


@pytest.mark.parametrize("prepare", [lambda model: model, frozen_and_moving])
@pytest.mark.parametrize("kind", ["renorm", "ours", "biased", "ghost"])
def test_a_checkpoint_with_update_once_has_the_gradient_without(kind, prepare):
    model, twin = prepare(block(kind)), prepare(block(kind))
    found, expected = step(model, checkpointed), step(twin, lambda m, x: m(x))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    same_state(model, twin)


@pytest.mark.parametrize("prepare", [lambda model: model, frozen_and_moving])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_without_it_is_refused_by_name(reentrant, prepare):
    model = prepare(block())
    y = checkpoint(model, images().requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(BatchNormError, match="RenormBatchNorm is called again within the backward"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_plain_layers_may_be_recomputed(reentrant):
    model, twin = block("ours"), block("ours")

    def run(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    torch.testing.assert_close(step(model, run), step(twin, lambda m, x: m(x)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_moves_nothing_needs_no_update_once(reentrant):
    model, twin = block(), block()

    def run(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    with batchnorm.no_update(model), batchnorm.no_update(twin):
        torch.testing.assert_close(step(model, run), step(twin, lambda m, x: m(x)))


@pytest.mark.parametrize("prepare", [lambda model: model, frozen_and_moving])
@pytest.mark.parametrize("kind", ["renorm", "ours"])
def test_update_once_holds_for_every_backward_pass(kind, prepare):
    model, twin = prepare(block(kind)), prepare(block(kind))
    inputs = [images().requires_grad_() for _ in range(2)]
    outputs = checkpointed(model, inputs[0]).pow(3).mean(), twin(inputs[1]).pow(3).mean()
    for y in outputs:
        y.backward(retain_graph=True)
        y.backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    same_state(model, twin)


@pytest.mark.parametrize("prepare", [frozen_and_moving, partial(batchnorm.convert, to="renorm")])
def test_a_checkpoint_that_a_model_makes_itself_can_be_switched_off(prepare):
    import torchvision

    options = {"growth_rate": 4, "block_config": (2,), "num_init_features": 4, "num_classes": 2}
    model = prepare(torchvision.models.DenseNet(**options, memory_efficient=True))
    x, off = torch.randn(4, 3, 32, 32), "memory_efficient=False"
    y = model(x)
    with pytest.raises(BatchNormError, match=rf"{off}.* batchnorm\.freeze\(model\)"):
        y.sum().backward()
    other = prepare(torchvision.models.DenseNet(**options, memory_efficient=False))
    other(x).sum().backward()
    batchnorm.freeze(model)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_in_evaluation_a_checkpoint_changes_nothing():
    model, twin = block().eval(), block().eval()

    def run(model, x):
        return checkpoint(model, x, use_reentrant=True)

    torch.testing.assert_close(step(model, run), step(twin, lambda m, x: m(x)))


# calls by keyword


@pytest.mark.parametrize("kind", ["ours", "sync", "split"])
def test_one_update_finds_the_input_behind_a_mask(kind):
    layer, twin = made(kind), made(kind)
    keep = torch.rand(9, 5, 4) < 0.5
    with batchnorm.one_update(layer):
        layer(mask=keep, input=images())
    twin(images(), mask=keep)
    same_state(layer, twin)
    with batchnorm.one_update(layer):
        layer(axis=1, input=images())
    twin(images())
    same_state(layer, twin)


def test_accumulate_without_gradients_is_the_loss_of_the_large_batch():
    model, x = nn.Sequential(made("ours")), images()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        loss = batchnorm.accumulate(model, lambda m, x: m(x).pow(3).sum(), x.split(4))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, twin(x).pow(3).sum().detach())
    same_state(model, twin)


def test_accumulate_joins_single_values_of_a_lenient_layer():
    model = batchnorm.single_values(nn.Sequential(made("ours")))
    twin, x = copy.deepcopy(model), torch.randn(4, 3, dtype=torch.float64)
    loss = batchnorm.accumulate(model, lambda m, x: m(x).pow(3).sum(), x.split(1))
    torch.testing.assert_close(loss, twin(x).pow(3).sum())
    same_state(model, twin)


@pytest.mark.parametrize("kind", ["split", "frozen"])
def test_accumulate_takes_members_that_normalize_as_the_plain_layer(kind):
    model, x = nn.Sequential(made(kind)), images()
    twin = copy.deepcopy(model)
    loss = batchnorm.accumulate(model, lambda m, x: m(x).pow(3).sum(), x.split(4))
    torch.testing.assert_close(loss, twin(x).pow(3).sum())
    same_state(model, twin)


def test_accumulate_says_where_gradients_are_switched_off():
    model = nn.Sequential(made("ours"))

    def loss(model, x):
        with torch.no_grad():
            return model(x).sum()

    with pytest.raises(BatchNormError, match=r"or under a torch\.no_grad of loss_fn's own"):
        batchnorm.accumulate(model, loss, images().split(4))


@pytest.mark.parametrize("kind", [k for k in MEMBERS if k != "frozen"])
def test_a_freeze_knows_the_axis(kind):
    layer = made(kind)
    frozen = batchnorm.freeze(copy.deepcopy(layer))
    expected = copy.deepcopy(layer).eval()(images())
    torch.testing.assert_close(frozen(images().movedim(1, -1), axis=-1).movedim(-1, 1), expected)


# what is no tensor, no mask, no axis


KEEP = torch.ones(9, 5, 4, dtype=torch.bool)


@EVERY
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ([1.0], {}, r"got a list and wants a torch\.Tensor"),
        ([1.0], {"axis": -1}, r"got a list and wants a torch\.Tensor"),
        ([1.0], {"mask": KEEP}, r"got a list and wants a torch\.Tensor"),
        (images().numpy(), {}, r"got a ndarray and wants a torch\.Tensor"),
        (images(), {"mask": [True]}, r"got a list as mask and wants a torch\.Tensor|takes one in"),
        (images(), {"axis": 2.0}, r"got axis=2\.0 for an input of shape \(9, 3, 5, 4\)"),
        (images(), {"axis": "1"}, r"got axis='1' for an input"),
        (images(), {"axis": 7, "mask": KEEP}, r"got axis=7 for an input"),
    ],
)
def test_what_is_no_tensor_and_no_axis_is_said(kind, training, given, options, said):
    layer = made(kind).train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(BatchNormError, match=said):
        layer(given, **options)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["ours", "sync", "renorm", "frozen"])
def test_with_a_mask_an_axis_is_a_whole_number(kind):
    with pytest.raises(BatchNormError, match=r"got axis=1\.0 .* a whole number"):
        made(kind)(images(), mask=KEEP, axis=1.0)


def test_a_layer_without_a_size_learns_none_from_an_axis_that_is_not_there():
    layer = batchnorm.BatchNorm()
    with pytest.raises(BatchNormError, match="got axis=7"):
        layer(images(), axis=7)
    assert layer(images().float()).shape == (9, 3, 5, 4)


# a first batch over large old statistics


def masked_call(layer, x):
    layer(x, mask=torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool))


def one_update_call(layer, x):
    with batchnorm.one_update(layer):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("prepare", "call"),
    [
        (lambda layer: layer, masked_call),
        (lambda layer: layer, one_update_call),
        (frozen_and_moving, lambda layer, x: layer(x)),
    ],
    ids=["mask", "one_update", "frozen"],
)
def test_a_first_batch_replaces_large_old_statistics_in_all_digits(prepare, call, dtype):
    layer = prepare(batchnorm.BatchNorm2d(3, momentum=None).to(dtype))
    layer.running_mean.fill_(1e9)
    layer.running_var.fill_(1e12)
    x = images().to(dtype) * 0.01
    call(layer, x)
    # a sum of 180 values rounds 180 times, and their signs differ
    rtol = 2 * 180 * torch.finfo(dtype).eps
    values = x.double().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(layer.running_mean.double(), values.mean(0), rtol=rtol, atol=0)
    torch.testing.assert_close(layer.running_var.double(), values.var(0), rtol=rtol, atol=0)
    assert layer.num_batches_tracked == 1
