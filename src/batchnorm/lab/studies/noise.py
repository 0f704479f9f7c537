"""More noise behind each norm, or none in its statistics: what becomes of the gain?"""

from batchnorm.lab.effects import Best, Difference
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import FULL, QUICK, SMALL, WITH, WITHOUT
from batchnorm.lab.study import Arm, Question, Size, Study, Text

RATES = (0.3, 1.0, 3.0)

STUDY = Study(
    name="noise",
    claim=Text(
        "Batch normalization may work by adding random noise to the data.",
        "批量归一化的作用原理可能是通过为数据加入了随机的噪声。",
    ),
    source="the note; Santurkar et al. 2018, https://arxiv.org/abs/1805.11604",
    arms=(
        WITHOUT,
        WITH,
        Arm(
            "noisy",
            Text("with BN and noise behind it", "批量归一化后加噪声"),
            {"arm": "batch-noise"},
        ),
        Arm(
            "population",
            Text("with population statistics", "用总体统计量归一化"),
            {"arm": "batch-population"},
        ),
    ),
    sizes={
        "quick": Size(8, QUICK, {"learning_rate": (1.0,)}),
        "normal": Size(10, SMALL, {"learning_rate": RATES}),
        "full": Size(20, FULL, {"learning_rate": RATES}),
    },
    questions=(
        Question(
            "noise-helps",
            Text(
                "More noise behind the norms raises the test accuracy.",
                "在归一化之后加更多噪声会提高测试精度。",
            ),
            Difference("test_accuracy", "noisy", "batch", Best()),
            Rule(low=0),
        ),
        Question(
            "less-noise-hurts",
            Text(
                "Normalized by population statistics in training, without the noise of the batch "
                "(and the gradient through it), it ends lower.",
                "训练时用总体统计量归一化，没有小批量的噪声（以及经过统计量的梯度），测试精度更低。",
            ),
            Difference("test_accuracy", "population", "batch", Best()),
            Rule(high=0),
        ),
        Question(
            "gain-survives",
            Text(
                "With the noise, batch norm still ends higher than no norm: what it gives is not a "
                "steady distribution.",
                "加了噪声，批量归一化的测试精度仍高于不用归一化：它的作用不在于使分布稳定。",
            ),
            Difference("test_accuracy", "noisy", "none", Best()),
            Rule(low=0),
        ),
    ),
)
