"""Where the layer stands: before the activation, after it, or once, on the input."""

from batchnorm.lab.effects import Best, Difference
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import FULL, QUICK, SMALL, WITHOUT
from batchnorm.lab.study import Arm, Question, Size, Study, Text

RATES = (0.3, 1.0, 3.0)

STUDY = Study(
    name="position",
    claim=Text(
        "Batch normalization belongs before the activation, or on the input.",
        "批量归一化一般用于输出之后、激活函数之前，或者输入之后；放在激活函数之后显得很奇怪。",
    ),
    source="the note",
    arms=(
        WITHOUT,
        Arm("before", Text("before the activation", "激活函数之前"), {"arm": "batch"}),
        Arm(
            "after",
            Text("after the activation", "激活函数之后"),
            {"arm": "batch", "network": "lenet-norm-after"},
        ),
        Arm(
            "input",
            Text("on the input only", "仅在输入处"),
            {"arm": "batch", "network": "lenet-norm-input"},
        ),
    ),
    sizes={
        "quick": Size(8, QUICK, {"learning_rate": (1.0,)}),
        "normal": Size(10, SMALL, {"learning_rate": RATES}),
        "full": Size(20, FULL, {"learning_rate": RATES}),
    },
    questions=(
        *tuple(
            Question(
                f"before-{other}",
                Text(
                    f"Each at its best rate, before the activation ends higher than {english}.",
                    f"各取最佳学习率时，放在激活函数之前的测试精度高于{chinese}。",
                ),
                Difference("test_accuracy", "before", other, Best()),
                Rule(low=0),
            )
            for other, english, chinese in (
                ("after", "after it", "放在激活函数之后"),
                ("input", "on the input only", "仅放在输入处"),
            )
        ),
        Question(
            "input-none",
            Text(
                "Each at its best rate, on the input only ends higher than none at all.",
                "各取最佳学习率时，仅放在输入处的测试精度高于完全不用。",
            ),
            Difference("test_accuracy", "input", "none", Best()),
            Rule(low=0),
        ),
    ),
)
