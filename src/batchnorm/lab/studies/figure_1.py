"""Ioffe & Szegedy's first experiment: an MLP of sigmoids, on Fashion-MNIST in place of MNIST."""

from typing import Any

from batchnorm.lab.effects import Difference
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import WITH, WITHOUT
from batchnorm.lab.study import Question, Size, Study, Text

# the paper names no learning rate; 0.1 without momentum is the usual one
RUN: dict[str, Any] = {
    "data": "fashion-mnist", "train_images": 60_000, "steps": 3_000, "learning_rate": 0.1,
}  # fmt: skip

STUDY = Study(
    name="figure-1",
    claim=Text(
        "Batch normalization trains faster and to a higher accuracy, and keeps what goes into a "
        "unit steady.",
        "批量归一化训练更快、精度更高，并使单元的输入分布更稳定。",
    ),
    source="Ioffe & Szegedy 2015, §4.1 and Figure 1, https://arxiv.org/abs/1502.03167",
    arms=(WITHOUT, WITH),
    sizes={
        "quick": Size(8, RUN | {"steps": 400}),
        "normal": Size(10, RUN),
        "full": Size(20, RUN | {"steps": 50_000}),
    },
    questions=(
        Question(
            "sooner",
            Text(
                "After a fifth of the steps the test accuracy is higher.",
                "训练到五分之一步数时，测试精度更高。",
            ),
            Difference("early_accuracy", "batch", "none"),
            Rule(low=0),
        ),
        Question(
            "higher",
            Text("At the end it is higher, too.", "训练结束时也更高。"),
            Difference("accuracy", "batch", "none"),
            Rule(low=0),
        ),
        Question(
            "steadier",
            Text(
                "The median of a unit's input drifts less in the second half of training, relative "
                "to its width.",
                "在训练后半程，单元输入的中位数相对其宽度漂移更小。",
            ),
            Difference("drift", "batch", "none"),
            Rule(high=0),
        ),
    ),
    function="batchnorm.lab.studies.probes:figure_1",
)
