"""Gradients at initialization: one backward pass through a deep network, and a fitted slope."""

from batchnorm.lab.effects import Level
from batchnorm.lab.statistics import Rule
from batchnorm.lab.study import Arm, Question, Size, Study, Text

# a layer of infinite width: √(π/(π−1)) = 1.211; a tenth of that growth is left to a finite one
TOLERANCE = 0.02
GROWTH = 1.21
NETWORK = {"depth": 30, "width": 512, "batch_size": 256}

STUDY = Study(
    name="gradient-growth",
    claim=Text(
        "At initialization batch normalization makes gradients explode with depth.",
        "初始化时，批量归一化使梯度随深度爆炸。",
    ),
    source="Yang et al. 2019, https://arxiv.org/abs/1902.08129",
    arms=(
        Arm("none", Text("without BN", "无批量归一化"), {"normalized": False}),
        Arm("batch", Text("with BN", "有批量归一化"), {"normalized": True}),
    ),
    sizes={
        "quick": Size(8, NETWORK | {"width": 256, "batch_size": 128}),
        "normal": Size(10, NETWORK),
        "full": Size(20, NETWORK | {"depth": 50, "width": 1024, "batch_size": 512}),
    },
    questions=(
        Question(
            "explodes",
            Text(
                "With batch norm and ReLU the gradient grows by √(π/(π−1)) = 1.21 a layer "
                "(1.19 to 1.23).",
                "用批量归一化和 ReLU 时，梯度每层增大 √(π/(π−1)) = 1.21 倍（1.19 到 1.23）。",
            ),
            Level("growth", "batch"),
            Rule(GROWTH - TOLERANCE, GROWTH + TOLERANCE),
        ),
        Question(
            "stays-without",
            Text(
                "Without it, from He's initialization, it stays (0.98 to 1.02 a layer).",
                "不用时，从 He 初始化出发，梯度保持不变（每层 0.98 到 1.02 倍）。",
            ),
            Level("growth", "none"),
            Rule(1 - TOLERANCE, 1 + TOLERANCE),
        ),
    ),
    function="batchnorm.lab.studies.probes:gradient_growth",
)
