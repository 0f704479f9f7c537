"""Ghost batches: a large batch whose statistics are those of small ones."""

from batchnorm.lab.arms import GHOST_SIZES
from batchnorm.lab.effects import Best, Difference
from batchnorm.lab.statistics import Rule
from batchnorm.lab.studies._arms import QUICK, SHORT
from batchnorm.lab.study import Arm, Question, Size, Study, Text

RATES = (1.0, 3.0)
# the paper's batch is 4,096, of which 10,000 images make two: with ten of 1,024 six epochs are 60
# steps. Only --full has images for the paper's
BATCHES = SHORT | {"train_images": 10_240, "batch_size": 1_024, "epochs": 6}
FEW = {"test_images": 2_000, "held_out_images": 2_000, "recalibration_images": 1_000}

STUDY = Study(
    name="ghost-size",
    claim=Text(
        "A large batch generalizes worse than a small one, and statistics of small groups of it "
        "close the gap.",
        "大批量的泛化不如小批量，而按其中的小组计算统计量可以弥补差距。",
    ),
    source="Hoffer et al. 2017, https://arxiv.org/abs/1705.08741",
    arms=(
        Arm("small", Text("batch of 64", "批量 64"), {"arm": "batch", "batch_size": 64}),
        Arm("whole", Text("large batch", "大批量"), {"arm": "batch"}),
        *(
            Arm(
                f"ghost-{size}",
                Text(f"large, in groups of {size}", f"大批量，每组 {size}"),
                {"arm": f"ghost-{size}"},
            )
            for size in GHOST_SIZES
        ),
    ),
    sizes={
        "quick": Size(
            8,
            QUICK | {"train_images": 4_096, "batch_size": 512, "epochs": 4},
            {"learning_rate": (1.0,)},
        ),
        "normal": Size(10, BATCHES | FEW, {"learning_rate": RATES}),
        "full": Size(
            20,
            BATCHES | {"train_images": 49_152, "batch_size": 4_096, "epochs": 20},
            {"learning_rate": RATES},
        ),
    },
    questions=(
        Question(
            "gap",
            Text(
                "After as many epochs, each at its best rate, the small batch ends higher.",
                "训练同样轮数、各取最佳学习率时，小批量的测试精度更高。",
            ),
            Difference("test_accuracy", "small", "whole", Best()),
            Rule(low=0),
        ),
        *(
            Question(
                f"ghost-{size}",
                Text(
                    f"In groups of {size} the large batch ends higher than as a whole.",
                    f"按每组 {size} 个样本归一化时，大批量的测试精度高于整体归一化。",
                ),
                Difference("test_accuracy", f"ghost-{size}", "whole", Best()),
                Rule(low=0),
            )
            for size in GHOST_SIZES
        ),
    ),
)
