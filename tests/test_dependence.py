"""Whether a norm is what makes an output depend on the rest of its batch."""

import pytest
import torch
from torch import nn

import batchnorm
import rules as cases
from batchnorm.checks.findings import Level


class Similarities(nn.Module):
    """Each sample beside the others of its batch, on purpose."""

    def forward(self, x):
        return torch.softmax(x @ x.T, 1) @ x


class Centred(nn.Module):
    """No norm: the scale stays."""

    def forward(self, x):
        return x - x.mean(0)


class ByHand(nn.Module):
    """A batch norm that never asks whether it is trained."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, channels))

    def forward(self, x):
        var, mean = torch.var_mean(x, 0, correction=0)
        return self.weight * (x - mean) / (var + 1e-5).sqrt()


def model(head):
    return cases.trained(nn.Sequential(cases.network(), head))


def found(head):
    return batchnorm.check(model(head).eval(), cases.loader(), select="BN033", level="note")


@pytest.mark.parametrize("head", [Similarities(), Centred()], ids=["similarities", "centred"])
def test_a_head_that_compares_samples_is_a_note(head):
    (finding,) = found(head)
    assert finding.level is Level.NOTE
    assert finding.layer == "1"
    assert finding.evidence.endswith("and no batch norm is seen to do it")


class Operator(nn.Module):
    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize(
    "head",
    [ByHand(2), Operator(), nn.BatchNorm1d(2, track_running_stats=False)],
    ids=["by hand", "operator", "class"],
)
def test_a_norm_is_an_error_where_it_stands(head):
    (finding,) = found(head)
    assert finding.level is Level.ERROR
    assert finding.layer == "1"
