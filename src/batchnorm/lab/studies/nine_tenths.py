"""The note's number: LeNet with batch norm, all images, ten epochs."""

import math
from typing import Any

from batchnorm.lab.effects import At, Level
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import QUICK
from batchnorm.lab.study import Arm, Question, Size, Study, Text

RECIPE: dict[str, Any] = {"arm": "batch", "learning_rate": 1.0, "batch_size": 256}
# what 10,000 test images can tell from .9 (one-sided, 95%), and what rounds to .90: .895
NEARLY = round(0.9 - 1.645 * math.sqrt(0.9 * 0.1 / 10_000), 3)
WHOLE = RECIPE | {"epochs": 10, "evaluations_per_epoch": 1}
SCHEDULES = {
    "constant": Text("at a constant rate", "学习率不变"),
    "cosine": Text("at a rate that decays", "学习率衰减"),
}
STATISTICS = {
    "test_accuracy": Text("running statistics", "滑动统计量"),
    "recalibrated_test_accuracy": Text("recalibrated statistics", "重新校准的统计量"),
}

STUDY = Study(
    name="nine-tenths",
    claim=Text(
        "With batch normalization, ten epochs give a test accuracy of about 0.9.",
        "同样扫了十遍数据，添加了批量归一化之后，模型测试精度可以达到 0.9 左右。",
    ),
    source="the note",
    arms=tuple(Arm(name, label, {"schedule": name}) for name, label in SCHEDULES.items()),
    sizes={
        "quick": Size(8, QUICK | RECIPE | {"batch_size": 64}),
        "normal": Size(10, WHOLE),
        "full": Size(20, WHOLE),
    },
    questions=tuple(
        Question(
            f"{schedule}-{quantity.removesuffix('_test_accuracy').replace('test_accuracy', 'running')}",
            Text(
                f"{label.en[0].upper()}{label.en[1:]}, with {kind.en}: above {NEARLY:.3f}.",
                f"{label.zh}，用{kind.zh}：高于 {NEARLY:.3f}。",
            ),
            Level(quantity, schedule, At()),
            Rule(low=NEARLY),
        )
        for schedule, label in SCHEDULES.items()
        for quantity, kind in STATISTICS.items()
    ),
)
