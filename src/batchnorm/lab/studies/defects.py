"""What each defect of the note's own layer does."""

from typing import Any

from batchnorm.lab.effects import Gap, Level
from batchnorm.lab.statistics import Rule
from batchnorm.lab.study import Arm, Question, Size, Study, Text

TRAINED: dict[str, Any] = {
    "data": "fashion-mnist", "train_images": 10_000, "epochs": 2, "learning_rate": 1.0,
}  # fmt: skip
NOTE = "note"
CHANCE = 0.2  # who knows one class of ten from the rest, and answers one of the others, has .2

STUDY = Study(
    name="defects",
    claim=Text(
        "The note's layer has defects that show.",
        "笔记中的层有看得见的缺陷。",
    ),
    source="the note's code",
    arms=(Arm(NOTE, Text("LeNet with the note's layer", "用笔记中的层的 LeNet"), {}),),
    sizes={
        "quick": Size(8, TRAINED | {"train_images": 4_000}),
        "normal": Size(10, TRAINED),
        "full": Size(20, TRAINED | {"train_images": 60_000}),
    },
    questions=(
        Question(
            "lost-statistics",
            Text(
                "Reloaded from its state dict, the network is at chance (below .2).",
                "从 state dict 重新载入后，网络只有随机水平（低于 0.2）。",
            ),
            Level("reloaded", NOTE),
            Rule(high=CHANCE),
        ),
        Question(
            "grad-mode",
            Text(
                "In eval() with gradients on, batches of one class lose accuracy.",
                "在 eval() 中开启梯度时，同一类别组成的批量精度下降。",
            ),
            Gap(Level("with_gradients", NOTE), Level("accuracy", NOTE)),
            Rule(high=0),
        ),
        Question(
            "untrained",
            Text(
                "An evaluation before training multiplies by 1/√1e-5 = 316.",
                "训练之前评估会乘以 1/√1e-5 = 316。",
            ),
            Level("untrained_scale", NOTE),
            Rule(316, 317),
        ),
        Question(
            "scalars",
            Text(
                "The norms of LeNet have 8 parameters in place of 452.",
                "LeNet 的归一化层只有 8 个参数，而不是 452 个。",
            ),
            Level("parameters", NOTE),
            Rule(7.5, 8.5),  # a count
        ),
    ),
    function="batchnorm.lab.studies.probes:defects",
)
