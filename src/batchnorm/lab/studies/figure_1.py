"""Ioffe & Szegedy's first experiment: an MLP of sigmoids, on Fashion-MNIST in place of MNIST."""

from typing import Any

from batchnorm.lab.effects import Best, Difference
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import WITH, WITHOUT
from batchnorm.lab.study import Question, Size, Study, Text

# the paper names no learning rate: each arm has its best, by images that are not trained on
RATES = {"learning_rate": (0.1, 0.3, 1.0, 3.0, 10.0)}
RUN: dict[str, Any] = {
    "data": "fashion-mnist", "train_images": 55_000, "held_out_images": 5_000, "steps": 3_000,
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
        "quick": Size(8, RUN | {"steps": 400}, RATES),
        "normal": Size(10, RUN, RATES),
        "full": Size(20, RUN | {"steps": 50_000}, RATES),
    },
    questions=(
        Question(
            "sooner",
            Text(
                "Each at its best rate, the test accuracy is higher after a fifth of the steps.",
                "各取最佳学习率，训练到五分之一步数时，测试精度更高。",
            ),
            Difference("early_accuracy", "batch", "none", Best()),
            Rule(low=0),
        ),
        Question(
            "higher",
            Text("At the end it is higher, too.", "训练结束时也更高。"),
            Difference("accuracy", "batch", "none", Best()),
            Rule(low=0),
        ),
        Question(
            "steadier",
            Text(
                "The median of a unit's input drifts less in the second half of training, relative "
                "to its width.",
                "在训练后半程，单元输入的中位数相对其宽度漂移更小。",
            ),
            Difference("drift", "batch", "none", Best()),
            Rule(high=0),
        ),
    ),
    function="batchnorm.lab.studies.probes:figure_1",
)
