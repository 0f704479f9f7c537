"""Larger learning rates: a grid over three and a half decades, every cell with and without."""

from batchnorm.lab.effects import Best, Difference, Reach
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import FULL, QUICK, SMALL, WITH, WITHOUT
from batchnorm.lab.study import Question, Size, Study, Text

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SIZES = {
    "quick": Size(8, QUICK, {"learning_rate": (0.1, 1.0, 10.0)}),
    "normal": Size(10, SMALL, {"learning_rate": RATES}),
    "full": Size(20, FULL, {"learning_rate": RATES}),
}

STUDY = Study(
    name="learning-rate",
    claim=Text(
        "Batch normalization allows a larger learning rate, and so trains faster.",
        "批量归一化允许我们选择更大的学习率，从而加快模型训练速度。",
    ),
    source="the note; Ioffe & Szegedy 2015, §4.2",
    arms=(WITHOUT, WITH),
    sizes=SIZES,
    questions=(
        Question(
            "largest-rate",
            Text(
                "The largest usable rate (no divergence, held-out accuracy above .5) is larger with "
                "batch norm; in powers of ten.",
                "有批量归一化时，可用的最大学习率更大（不发散，且留出集精度高于 0.5）；以 10 的幂计。",
            ),
            Reach("learning_rate", "batch", "none"),
            Rule(low=0),
        ),
        Question(
            "at-the-best-rates",
            Text(
                "Each at its best rate, batch norm ends at a higher test accuracy.",
                "各取最佳学习率时，有批量归一化的测试精度更高。",
            ),
            Difference("test_accuracy", "batch", "none", Best()),
            Rule(low=0),
        ),
        Question(
            "at-matched-rates",
            Text(
                "Both at the rate that is best without batch norm, it still ends higher.",
                "都取无批量归一化时的最佳学习率，有批量归一化的测试精度仍更高。",
            ),
            Difference("test_accuracy", "batch", "none", Best(of="none")),
            Rule(low=0),
        ),
    ),
)
