"""Everything frozen at its random start but weight and bias of the norms."""

from batchnorm.lab.effects import LEARNED, Best, Level
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import FULL, QUICK, SHORT
from batchnorm.lab.study import Arm, Question, Size, Study, Text

RATES = (1.0, 10.0)
BATCH = {"arm": "batch"}
RESNET = BATCH | {"initialization": "as-built"}

STUDY = Study(
    name="only-norms",
    claim=Text(
        "Training weight and bias of batch normalization alone reaches far above chance.",
        "只训练批量归一化的权重和偏置，精度也远高于随机水平。",
    ),
    source="Frankle et al. 2020, https://arxiv.org/abs/2003.00152",
    arms=(
        Arm("lenet", Text("LeNet", "LeNet"), BATCH | {"network": "lenet-only-norms"}),
        Arm(
            "resnet", Text("small ResNet", "小型 ResNet"), RESNET | {"network": "resnet-only-norms"}
        ),
    ),
    sizes={
        "quick": Size(8, QUICK, {"learning_rate": (1.0,)}),
        "normal": Size(10, SHORT, {"learning_rate": RATES}),
        "full": Size(20, FULL, {"learning_rate": RATES}),
    },
    questions=tuple(
        Question(
            network,
            Text(
                f"{network}: a test accuracy above .5, halfway from chance to .9.",
                f"{network}：测试精度高于 0.5，即随机水平与 0.9 的中点。",
            ),
            Level("test_accuracy", network, Best()),
            Rule(low=LEARNED),
        )
        for network in ("lenet", "resnet")
    ),
)
