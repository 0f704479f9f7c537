"""Whether the answer is LeNet's alone: a small ResNet, with and without."""

from batchnorm.lab.effects import Best, Difference, Reach
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import FULL, QUICK, SHORT, WITH, WITHOUT
from batchnorm.lab.study import Question, Size, Study, Text

NETWORK = {"network": "resnet", "initialization": "kaiming-normal"}
RATES = (0.01, 0.1, 1.0)

STUDY = Study(
    name="residual",
    claim=Text(
        "What holds for LeNet holds for a small ResNet of ReLUs.",
        "对 LeNet 成立的，对使用 ReLU 的小型 ResNet 也成立。",
    ),
    source="De & Smith 2020, https://arxiv.org/abs/2002.10444",
    arms=(WITHOUT, WITH),
    sizes={
        "quick": Size(8, QUICK | NETWORK, {"learning_rate": (0.1, 1.0)}),
        "normal": Size(10, SHORT | NETWORK, {"learning_rate": RATES}),
        "full": Size(20, FULL | NETWORK, {"learning_rate": (*RATES, 10.0)}),
    },
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
    ),
)
