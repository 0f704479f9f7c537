"""As few seconds as it takes to 0.90, on two threads, each network alone on the machine."""

from typing import Any

from batchnorm.lab.effects import Level
from batchnorm.lab.statistics import Rule
from batchnorm.lab.study import Arm, Question, Size, Study, Text

# chosen by 5,000 training images that were held out (benchmarks/fast.py); then all are trained on
RECIPE: dict[str, Any] = {
    "data": "fashion-mnist", "epochs": 3, "batch_size": 256, "learning_rate": 0.3, "threads": 2,
}  # fmt: skip
FAST = Arm("fast", Text("fast recipe", "快速方案"), {})

STUDY = Study(
    name="fast",
    claim=Text(
        "With batch normalization a network of LeNet's size reaches a test accuracy of 0.9 in "
        "seconds.",
        "有批量归一化时，LeNet 大小的网络几秒钟即可达到 0.9 的测试精度。",
    ),
    source="this project's goal, for the note's accuracy",
    arms=(FAST,),
    sizes={"quick": Size(8, RECIPE), "normal": Size(10, RECIPE), "full": Size(20, RECIPE)},
    questions=(
        Question(
            "nine-tenths",
            Text("The test accuracy is above .90.", "测试精度高于 0.90。"),
            Level("accuracy", FAST.name),
            Rule(low=0.9),
        ),
        Question(
            "seconds",
            Text(
                "From the network's making to the number it takes less than 12 seconds on two "
                "threads.",
                "从建立网络到得出数值，两个线程用时不到 12 秒。",
            ),
            Level("seconds", FAST.name),
            Rule(high=12),
        ),
    ),
    function="batchnorm.lab.studies.probes:fast",
    alone=True,
)
