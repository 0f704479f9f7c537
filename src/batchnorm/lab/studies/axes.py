"""Over which axes the statistics are taken."""

from batchnorm.lab.effects import Level
from batchnorm.lab.statistics import Rule
from batchnorm.lab.study import Arm, Question, Size, Study, Text

# outputs have a standard deviation of 1 and reach about 5, where float32 has steps of 5e-7: 1e-4
# leaves room for sums of 64 · 24 · 24 values; a tenth of a standard deviation is no rounding
EQUAL, ELSE = 1e-4, 0.1

STUDY = Study(
    name="axes",
    claim=Text(
        "It acts on the features of a linear layer and the channels of a convolution, where each "
        "pixel is a sample.",
        "批量归一化层作用于全连接层的特征维、卷积层的通道维，把每个像素点看作一个样本。",
    ),
    source="the note",
    arms=(Arm("layer", Text("the layer", "批量归一化层"), {}),),
    sizes={
        "quick": Size(8, {"data": "fashion-mnist"}),
        "normal": Size(10, {"data": "fashion-mnist"}),
        "full": Size(20, {"data": "fashion-mnist"}),
    },
    questions=(
        Question(
            "pixels",
            Text(
                "The layer of images is the layer of features on pixels (to 1e-4).",
                "图片上的层等于把像素作为样本的特征层（误差不超过 1e-4）。",
            ),
            Level("pixels", "layer"),
            Rule(high=EQUAL),
        ),
        Question(
            "features",
            Text(
                "Features are normalized each by itself, over the samples (to 1e-4).",
                "各特征分别在样本上归一化（误差不超过 1e-4）。",
            ),
            Level("features", "layer"),
            Rule(high=EQUAL),
        ),
        Question(
            "not-images",
            Text(
                "Statistics of each image by itself are something else (differ by more than .1).",
                "每张图片各自的统计量则不同（相差超过 0.1）。",
            ),
            Level("images", "layer"),
            Rule(low=ELSE),
        ),
    ),
    function="batchnorm.lab.studies.probes:axes",
)
