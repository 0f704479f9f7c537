"""What a batch's own statistics add to the loss: a penalty on the weights of the norms."""

from typing import Any

from batchnorm.lab.effects import Level
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies.fixed_moments import LENET
from batchnorm.lab.study import Question, Size, Study, Text

SIZES = (32, 64, 128, 256)  # batches; of larger ones the excess drowns in its own noise
TRAINED: dict[str, Any] = {
    "data": "fashion-mnist", "train_images": 8_192, "epochs": 3, "learning_rate": 3.0,
    "sizes": SIZES, "rounds": 3,
}  # fmt: skip
TENTH = 0.1  # of the power that is claimed; the terms in 1/M² are beyond the theorem

STUDY = Study(
    name="regularizer",
    claim=Text(
        "Batch normalization is population normalization and a decay of its weights, which is the "
        "weaker the larger the batch.",
        "批量归一化相当于用总体统计量归一化，再加上对其权重的衰减；批量越大，衰减越弱。",
    ),
    source="Luo et al. 2019, https://arxiv.org/abs/1809.00846",
    arms=(LENET,),
    sizes={
        "quick": Size(8, TRAINED | {"train_images": 4_096, "epochs": 1, "rounds": 2}),
        "normal": Size(10, TRAINED),
        "full": Size(20, TRAINED | {"train_images": 49_152, "epochs": 10, "rounds": 4}),
    },
    questions=(
        Question(
            "inverse-to-the-batch",
            Text(
                "The loss with a batch's statistics exceeds the one with those of all images by "
                "something proportional to 1/M for M images (a power from −1.1 to −0.9).",
                "用小批量统计量的损失高于用总体统计量的损失，其差与批量大小 M 成反比"
                "（幂次在 −1.1 到 −0.9 之间）。",
            ),
            Level("power", LENET.name),
            Rule(-1 - TENTH, -1 + TENTH),
        ),
        Question(
            "pulls-the-weights",
            Text(
                "The excess falls as the weights of the norms shrink: its gradient is a decay.",
                "归一化层的权重减小时该差值下降：其梯度就是一种权重衰减。",
            ),
            Level("pull", LENET.name),
            Rule(low=0),
        ),
    ),
    function="batchnorm.lab.studies.probes:regularizer",
)
