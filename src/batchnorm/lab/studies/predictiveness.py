"""How far the gradient can be trusted: loss and gradient along its direction.

Of a network of ReLUs that trains without norms, too, at rates at which both do: a LeNet of sigmoids
without norms is at chance in its first epoch, and there the loss is flat. The questions are asked at one
rate; the others show how far the answers hang on it.
"""

from typing import Any

from batchnorm.lab.effects import At, Difference
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import WITH, WITHOUT
from batchnorm.lab.study import Question, Size, Study, Text

RUN: dict[str, Any] = {
    "data": "fashion-mnist", "network": "fast", "train_images": 10_000, "every": 10, "reach": 4.0,
}  # fmt: skip
RATES = {"learning_rate": (0.03, 0.1, 0.3)}
ASKED = At({"learning_rate": 0.1})

STUDY = Study(
    name="predictiveness",
    claim=Text(
        "With batch normalization the loss is smoother and gradients are more predictable.",
        "批量归一化使损失更平滑、梯度更可预测。",
    ),
    source="Santurkar et al. 2018, Figure 4, https://arxiv.org/abs/1805.11604",
    arms=(WITHOUT, WITH),
    sizes={
        "quick": Size(8, RUN | {"train_images": 2_000}, RATES),
        "normal": Size(10, RUN, RATES),
        "full": Size(20, RUN | {"train_images": 60_000}, RATES),
    },
    questions=(
        Question(
            "gradient",
            Text(
                "Within four steps along the gradient, it changes less (relative to its size).",
                "沿梯度方向四步之内，梯度（相对其大小）变化更小。",
            ),
            Difference("gradient_change", "batch", "none", ASKED),
            Rule(high=0),
        ),
        Question(
            "loss",
            Text("The loss varies less there.", "损失在该范围内变化更小。"),
            Difference("loss_range", "batch", "none", ASKED),
            Rule(high=0),
        ),
    ),
    function="batchnorm.lab.studies.probes:predictiveness",
)
