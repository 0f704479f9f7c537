"""Bjorck et al.: with batch norm at a small rate little is left of the gain. The same cells."""

from batchnorm.lab.effects import At, Best, Difference, Gap, Level
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies import learning_rate
from batchnorm.lab.studies._arms import WITH, WITHOUT
from batchnorm.lab.study import Question, Study, Text

# what 5,000 test images cannot tell from nothing (one-sided, 95%): 1.645 · √(.85 · .15 / 5,000)
NOTHING = 0.01
SMALL_RATE = At({"learning_rate": 0.1})

STUDY = Study(
    name="matched-rates",
    claim=Text(
        "The gain of batch normalization comes mainly from the larger learning rates it allows.",
        "批量归一化的收益主要来自它所允许的更大的学习率。",
    ),
    source="Bjorck et al. 2018, https://arxiv.org/abs/1806.02375",
    arms=(WITHOUT, WITH),
    sizes=learning_rate.SIZES,
    questions=(
        Question(
            "gain-of-the-rate",
            Text(
                "With batch norm, the best rate ends higher than a rate of 0.1.",
                "有批量归一化时，最佳学习率的测试精度高于学习率 0.1。",
            ),
            Gap(
                Level("test_accuracy", "batch", Best()), Level("test_accuracy", "batch", SMALL_RATE)
            ),
            Rule(low=0),
        ),
        Question(
            "nothing-at-a-small-rate",
            Text(
                "With batch norm at a rate of 0.1, the gain over the best without it is below .01.",
                "有批量归一化而学习率为 0.1 时，与无批量归一化的最佳结果相比，提高不到 0.01。",
            ),
            Gap(
                Level("test_accuracy", "batch", SMALL_RATE), Level("test_accuracy", "none", Best())
            ),
            Rule(high=NOTHING),
        ),
        Question(
            "more-at-large-rates",
            Text(
                "The difference of the arms is larger at their best rates than at 0.1.",
                "两组之差在各自最佳学习率处比在 0.1 处更大。",
            ),
            Gap(
                Difference("test_accuracy", "batch", "none", Best()),
                Difference("test_accuracy", "batch", "none", SMALL_RATE),
            ),
            Rule(low=0),
        ),
    ),
)
