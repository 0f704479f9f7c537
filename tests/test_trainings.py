"""watch on healthy trainings and on faults that hide: what the rules must tell apart."""

import copy

import pytest
import torch
from torch import nn

import batchnorm
import rules as cases


def data():
    return [cases.images(32, seed=k) for k in range(4)]


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def found(watching):
    return {(f.rule, f.layer): f for each in watching.findings() for f in each}


def sgd(model, rate=1e-3):
    return torch.optim.SGD(model.parameters(), lr=rate)


def test_validations_in_training_mode_beside_one_right_test():
    model, x = cases.network().train(), data()
    optimizer = sgd(model)
    with batchnorm.watch(select="BN002") as watching, torch.no_grad():
        for _ in range(10):
            for k in range(8):
                with torch.enable_grad():
                    step(optimizer, model(x[k % 4]).square().mean())
            [model(each) for each in x]
        model.eval()
        [model(each) for each in x]
    (finding,) = found(watching).values()
    assert finding.evidence == (
        "40 passes without gradients in training mode, 4 in evaluation mode"
    )


def test_statistics_by_hand_before_each_evaluation_are_no_evaluation():
    model, x = cases.network().train(), data()
    optimizer = sgd(model)
    with batchnorm.watch(select="BN002") as watching, torch.no_grad():
        for _ in range(3):
            for each in x:
                with torch.enable_grad():
                    step(optimizer, model(each).square().mean())
            [model(each) for each in x]
            model.eval()(x[0])
            model.train()
    assert not found(watching)


def generator_and_critic():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    critic = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    return generator, critic


def test_a_generator_without_gradients_in_the_critic_s_steps():
    """WGAN, five steps of the critic to one."""
    generator, critic = generator_and_critic()
    first, second = (torch.optim.Adam(m.parameters(), 1e-4) for m in (generator, critic))
    with batchnorm.watch(every=5) as watching:
        for k in range(100):
            with torch.no_grad():
                made = generator(torch.randn(32, 8))
            step(second, (critic(made) - critic(torch.randn(32, 16))).mean())
            if k % 5 == 4:
                step(first, -critic(generator(torch.randn(32, 8))).mean())
    assert not found(watching)


def test_sample_images_now_and_then():
    generator, critic = generator_and_critic()
    first, second = (torch.optim.Adam(m.parameters(), 1e-4) for m in (generator, critic))
    with batchnorm.watch() as watching:
        for k in range(60):
            made = generator(torch.randn(32, 8))
            step(second, (critic(made.detach()) - critic(torch.randn(32, 16))).mean())
            step(first, -critic(made).mean())
            if k % 15 == 14:
                with torch.no_grad():
                    generator(torch.randn(64, 8))
    assert not found(watching)


@pytest.mark.parametrize("moving", [True, False], ids=["follows", "stands still"])
def test_an_encoder_that_follows_another_and_a_teacher_that_does_not(moving):
    """MoCo's key encoder is in training mode; a teacher should be in evaluation mode."""
    model, x = cases.network().train(), data()
    other, optimizer = copy.deepcopy(model), sgd(model, 1e-2)
    with batchnorm.watch() as watching:
        for k in range(30):
            with torch.no_grad():
                target = other(x[k % 4])
            step(optimizer, (model(x[k % 4]) - target + 1).square().mean())
            with torch.no_grad():
                for theirs, ours in zip(other.parameters(), model.parameters(), strict=True):
                    theirs.lerp_(ours, 0.1 * moving)
    told = {rule for rule, _ in found(watching)}
    assert told == (set() if moving else {"BN005"})


@pytest.mark.parametrize(("shift", "harmful"), [(0.0, False), (2.0, True)])
def test_passes_without_gradients_of_other_data(shift, harmful):
    model, x = cases.network().train(), data()
    optimizer = sgd(model)
    with batchnorm.watch(every=5, select="BN005") as watching:
        for each in [*x, *x]:
            step(optimizer, model(each).square().mean())
            with torch.no_grad():
                model(each + shift)
                model(each + shift)
    told = found(watching)
    assert bool(told) == harmful
    if harmful:
        y, scale = torch.cat(x), model[0](torch.cat(x))
        first = told["BN005", "1"].numbers
        assert (first["without"], first["with"]) == (16, 8)
        mean, var = scale.mean((0, 2, 3)), scale.var((0, 2, 3))
        other = model[0](y + shift).mean((0, 2, 3))
        expected = ((other - mean).square() / (var + 1e-5)).mean().sqrt()
        assert first["apart"] == pytest.approx(expected.item(), rel=0.1)


def test_a_frozen_backbone_whose_training_ends_with_an_evaluation():
    model, x = cases.network().train(), data()
    for norm in (model[1], model[4]):
        norm.requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with batchnorm.watch(select="BN003") as watching:
        for k in range(20):
            step(optimizer, model(x[k % 4]).square().mean())
        with torch.no_grad():
            model.eval()(x[0])
    assert set(found(watching)) == {("BN003", "1"), ("BN003", "4")}


def test_a_discriminator_that_sees_two_kinds_in_turn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = sgd(model)
    with batchnorm.watch(every=5, select="BN001") as watching:
        for _ in range(60):
            real, made = torch.randn(32, 16) + 3, torch.randn(32, 16) - 3
            step(optimizer, (model(real) - model(made)).mean())
    assert not found(watching)
    with batchnorm.watch(every=5, select="BN001") as watching:
        for _ in range(60):
            real, made = torch.randn(32, 16) + 3, torch.randn(32, 16) - 3
            step(optimizer, (model(real) - model(made)).mean())
        with torch.no_grad():
            model.eval()(real)
    assert found(watching)


def test_a_training_is_not_run_through_when_a_model_is_let_go():
    """MoCo's forward moves its second encoder: a pass more would change the numbers."""

    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.passes = cases.network(), 0
            self.key = copy.deepcopy(self.query).requires_grad_(requires_grad=False)
            with torch.no_grad():
                [p.mul_(3) for p in self.key.parameters()]

        def forward(self, x):
            PASSES.append(1)
            with torch.no_grad():
                for ours, theirs in zip(
                    self.query.parameters(), self.key.parameters(), strict=True
                ):
                    theirs.lerp_(ours, 0.1)
            return (self.query(x) - self.key(x)).square().mean()

    PASSES = []

    def losses(*, watched):
        model, x, losses, kept = Moving().train(), data(), [], []
        optimizer = torch.optim.SGD(model.query.parameters(), lr=1e-3)
        with batchnorm.watch() if watched else torch.enable_grad():
            for k in range(4):
                loss = model(x[k])
                step(optimizer, loss)
                losses.append(loss.item())
                for _ in range(5):
                    kept.append(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
                    kept[-1](torch.randn(4, 3))
            return losses

    assert losses(watched=True) == losses(watched=False)
    assert len(PASSES) == 8


def test_a_wrong_mean_is_found_though_both_classify_by_chance():
    model = cases.network()
    model[1].running_mean.fill_(3.0)
    assert batchnorm.check(model, cases.loader(), select="BN001")
