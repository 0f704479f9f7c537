"""What several studies share: two arms, and a training that is small."""

from typing import Any

from batchnorm.lab.study import Arm, Text

WITHOUT = Arm("none", Text("without BN", "无批量归一化"), {"arm": "none"})
WITH = Arm("batch", Text("with BN", "有批量归一化"), {"arm": "batch"})

# LeNet without norms is still at chance after 471 steps in batches of 64, at any rate, and has
# begun to learn after 1,564, two epochs of 50,000 images, at 0.3 (docs/laboratory.md). The rate decays, so
# that the running statistics belong to the last weights; choices are made on other training images
SMALL: dict[str, Any] = {
    "train_images": 50_000,
    "held_out_images": 2_000,
    "test_images": 5_000,
    "recalibration_images": 1_000,
    "batch_size": 64,
    "epochs": 2,
    "schedule": "cosine",
    "evaluations_per_epoch": 1,
}
# for networks that leave chance at once
SHORT = SMALL | {"train_images": 10_000, "epochs": 3}
# LeNet without norms is at chance to the end: no more than a look
QUICK = SMALL | {
    "train_images": 4_000,
    "held_out_images": 1_000,
    "test_images": 1_000,
    "recalibration_images": 500,
    "epochs": 1,
}
FULL = SMALL | {
    "train_images": 50_000,
    "held_out_images": 10_000,
    "test_images": None,
    "epochs": 10,
}
