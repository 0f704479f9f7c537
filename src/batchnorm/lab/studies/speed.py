"""Examples per second, with and without; each cell alone on the machine."""

from typing import Any

from batchnorm.lab.effects import Difference
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import WITH, WITHOUT
from batchnorm.lab.study import Question, Size, Study, Text

TIMED: dict[str, Any] = {"data": "fashion-mnist", "steps": 100, "batch_size": 256}

STUDY = Study(
    name="speed",
    claim=Text(
        "That training is faster does not mean that more examples are processed a second.",
        "模型收敛更快，不代表模型每秒处理的样本数目更多。",
    ),
    source="the note",
    arms=(WITHOUT, WITH),
    sizes={
        "quick": Size(8, TIMED | {"steps": 40}),
        "normal": Size(10, TIMED),
        "full": Size(20, TIMED),
    },
    questions=(
        Question(
            "fewer-examples",
            Text(
                "Fewer examples a second with batch norm (logarithm of the ratio).",
                "有批量归一化时每秒处理的样本更少（比值的对数）。",
            ),
            Difference("examples_per_second", "batch", "none", ratio=True),
            Rule(high=0),
        ),
    ),
    function="batchnorm.lab.studies.probes:speed",
    alone=True,
)
