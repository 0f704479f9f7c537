"""docs/family-counts.md: its code runs."""

import re
from pathlib import Path

import torch
from torch.nn import functional as F

import batchnorm
import tiny

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "family-counts.md").read_text(encoding="utf-8")


def share_of_the_loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="sum") / 24


def test_the_code_runs():
    data = tiny.as_images()
    micro_batches = [(data.test_images[i : i + 8], data.test_labels[i : i + 8]) for i in (0, 8, 16)]
    model = tiny.network().train()
    names = {
        "torch": torch, "batchnorm": batchnorm, "N": 3, "T": 7, "lengths": torch.tensor([5, 2, 7]),
        "x": torch.randn(3, 8, 7), "micro_batches": micro_batches,
        "share_of_the_loss": share_of_the_loss, "optimizer": torch.optim.SGD(model.parameters()),
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 6
    for code in blocks:
        names["model"] = model
        exec(compile(code, "family-counts.md", "exec"), names)  # noqa: S102  # our own page
    assert names["y"].shape == (3, 7, 8)
    assert model(micro_batches[0][0][:8].bfloat16()).dtype == torch.bfloat16
