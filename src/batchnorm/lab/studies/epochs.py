"""How many epochs to a target.

An arm that does not reach it counts as if it did at the end, so a difference may be larger than said.
"""

from batchnorm.lab.effects import Best, Difference, EpochsTo
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import FULL, QUICK, SMALL, WITH, WITHOUT
from batchnorm.lab.study import Question, Size, Study, Text

OFTEN = {
    "evaluations_per_epoch": 5,
    "test_images": 1_000,
    "held_out_images": 1_000,
    "recalibration_images": 500,
}
RATES = (0.3, 1.0, 3.0)

STUDY = Study(
    name="epochs",
    claim=Text(
        "With batch normalization training needs fewer epochs.",
        "批量归一化使模型收敛更快。",
    ),
    source="the note; Ioffe & Szegedy 2015, §4.2",
    arms=(WITHOUT, WITH),
    sizes={
        "quick": Size(8, QUICK | OFTEN, {"learning_rate": (3.0,)}),
        "normal": Size(10, SMALL | OFTEN, {"learning_rate": RATES}),
        "full": Size(20, FULL | OFTEN, {"learning_rate": RATES}),
    },
    questions=tuple(
        Question(
            f"to-{target:g}",
            Text(
                f"Each at its best rate, a test accuracy of {target:g} is reached in fewer epochs.",
                f"各取最佳学习率时，达到 {target:g} 的测试精度所需轮数更少。",
            ),
            Difference(EpochsTo(target), "batch", "none", Best()),
            Rule(high=0),
        )
        for target in (0.5, 0.7)
    ),
)
