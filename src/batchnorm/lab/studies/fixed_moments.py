"""Mean and variance of a norm's output, and what weight and bias make of them."""

from typing import Any

from batchnorm.lab.effects import Level
from batchnorm.lab.statistics import Rule
from batchnorm.lab.study import Arm, Question, Size, Study, Text

TRAINED: dict[str, Any] = {
    "data": "fashion-mnist", "train_images": 5_000, "epochs": 2, "learning_rate": 1.0,
}  # fmt: skip
# eps takes eps/2·var from the standard deviation: a hundredth where var is 5e-4
PERCENT = 0.01
LENET = Arm("lenet", Text("LeNet with BN", "有批量归一化的 LeNet"), {})
SIZES = {
    "quick": Size(8, TRAINED | {"train_images": 2_000, "epochs": 1}),
    "normal": Size(10, TRAINED),
    "full": Size(20, TRAINED | {"train_images": 50_000, "epochs": 5}),
}

STUDY = Study(
    name="fixed-moments",
    claim=Text(
        "Each batch leaves the layer with a fixed mean and variance, which are learnable.",
        "每一批数据通过批量归一化层后，得到的数据的均值方差是一定的（均值方差是可学习的参数）。",
    ),
    source="the note",
    arms=(LENET,),
    sizes=SIZES,
    questions=(
        Question(
            "in-training",
            Text(
                "In training, mean and standard deviation of each channel are bias and |weight| to "
                "1%, whatever the brightness and contrast of the batch.",
                "训练时，无论图片的亮度和对比度如何，各通道的均值和标准差等于偏置和 |权重|，误差在 1% 以内。",
            ),
            Level("training", "lenet"),
            Rule(high=PERCENT),
        ),
        Question(
            "in-evaluation",
            Text(
                "In evaluation they are, too.",
                "评估时也是如此。",
            ),
            Level("evaluation", "lenet"),
            Rule(high=PERCENT),
        ),
        Question(
            "learned",
            Text(
                "Training gives the channels different weights (all start from 1; standard deviation above .01).",
                "训练使各通道的权重各不相同（起点都是 1；标准差大于 0.01）。",
            ),
            Level("weight_spread", "lenet"),
            Rule(low=PERCENT),
        ),
    ),
    function="batchnorm.lab.studies.probes:fixed_moments",
)
