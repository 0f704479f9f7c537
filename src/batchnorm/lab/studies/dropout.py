"""Dropout in front of batch norm shifts the variance that evaluation meets; behind it, not."""

from batchnorm.lab.effects import Best, Difference
from batchnorm.lab.networks import DROPOUT_RATES
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import FULL, QUICK, SHORT
from batchnorm.lab.study import Arm, Question, Size, Study, Text

BATCH = {"arm": "batch"}
RATES = (1.0, 3.0)
# a running variance averages 2/momentum − 1 = 19 batches of 64, and 256 test images are measured
# with it: a ratio of two such variances has a standard error of √(2/1,216 + 2/256) = .1
NOTICED = 0.1
NONE = Arm("no-dropout", Text("no dropout", "无丢弃"), {})
PLACES = {
    "before": Text("before the norms", "归一化之前"),
    "after": Text("after them", "归一化之后"),
}


def _arm(place: str, rate: float) -> Arm:
    label = Text(f"{rate:g} {PLACES[place].en}", f"{PLACES[place].zh}丢弃 {rate:g}")
    return Arm(f"{place}-{rate:g}", label, {"network": f"lenet-dropout-{place}-{rate:g}"})


STUDY = Study(
    name="dropout",
    claim=Text(
        "Batch normalization should not be mixed with dropout.",
        "批量归一化一般不与丢弃法混用。",
    ),
    source="the note; Li et al. 2018, https://arxiv.org/abs/1801.05134",
    arms=(NONE, *(_arm(place, rate) for place in PLACES for rate in DROPOUT_RATES)),
    sizes={
        "quick": Size(8, QUICK | BATCH, {"learning_rate": (3.0,)}),
        "normal": Size(10, SHORT | BATCH, {"learning_rate": RATES}),
        "full": Size(20, FULL | BATCH, {"learning_rate": RATES}),
    },
    questions=(
        Question(
            "variance-shift",
            Text(
                "Dropout of .5 before the norms makes the variance that they meet in evaluation, "
                "relative to the one they divide by, smaller than without (ratio lower by .1).",
                "在归一化之前丢弃 0.5，使评估时遇到的方差与所除的方差之比小于不丢弃时（低 0.1 以上）。",
            ),
            Difference("variance_ratio", "before-0.5", "no-dropout", Best()),
            Rule(high=-NOTICED),
        ),
        Question(
            "no-shift-after",
            Text(
                "Dropout of .5 after the norms leaves the ratio as it is without (within .1).",
                "在归一化之后丢弃 0.5，比值与不丢弃时相同（相差 0.1 以内）。",
            ),
            Difference("variance_ratio", "after-0.5", "no-dropout", Best()),
            Rule(-NOTICED, NOTICED),
        ),
        *(
            Question(
                f"{place}-hurts",
                Text(
                    f"Each at its best rate, dropout of .5 {PLACES[place].en} lowers the test accuracy.",
                    f"各取最佳学习率时，{PLACES[place].zh}丢弃 0.5 会降低测试精度。",
                ),
                Difference("test_accuracy", f"{place}-0.5", "no-dropout", Best()),
                Rule(high=0),
            )
            for place in PLACES
        ),
        Question(
            "shift-costs",
            Text(
                "Recalibrated without dropout, the same weights do better: the shift has a price.",
                "关闭丢弃并重新校准后，同样的权重精度更高：方差偏移是有代价的。",
            ),
            Difference("recalibration_gain", "before-0.5", "no-dropout", Best()),
            Rule(low=0),
        ),
    ),
)
