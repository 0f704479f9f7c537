"""Whether the layer is a linear (affine) transform: in evaluation, and in training."""

from batchnorm.lab.effects import Level
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies.fixed_moments import LENET, SIZES
from batchnorm.lab.study import Question, Study, Text

# float32 rounds each of the three values by 6e-8 of the largest, after a handful of operations
ROUNDING = 1e-5

STUDY = Study(
    name="linear",
    claim=Text(
        "Batch normalization is a linear transform of the data.",
        "批量归一化是对原数据做了一个线性变换。",
    ),
    source="the note",
    arms=(LENET,),
    sizes=SIZES,
    questions=tuple(
        Question(
            mode,
            Text(
                f"In {mode} the layer's value halfway between two batches is halfway between its "
                "values (to 1e-5 of the largest).",
                f"{chinese}，两批数据中点处的输出等于两个输出的中点（误差不超过最大值的 1e-5）。",
            ),
            Level(mode, "lenet"),
            Rule(high=ROUNDING),
        )
        for mode, chinese in (("evaluation", "评估时"), ("training", "训练时"))
    ),
    function="batchnorm.lab.studies.probes:linear",
)
