"""What several studies share: two arms, and a training that is small."""

from typing import Any

from batchnorm.lab.study import Arm, Text

WITHOUT = Arm("none", Text("without BN", "无批量归一化"), {"arm": "none"})
WITH = Arm("batch", Text("with BN", "有批量归一化"), {"arm": "batch"})

# 10,000 images in batches of 64 for 3 epochs: 471 steps; the rate decays, so that the running
# statistics belong to the last weights; choices are made on 5,000 other training images
SMALL: dict[str, Any] = {
    "train_images": 10_000,
    "held_out_images": 5_000,
    "test_images": 5_000,
    "recalibration_images": 2_000,
    "batch_size": 64,
    "epochs": 3,
    "schedule": "cosine",
    "evaluations_per_epoch": 1,
}
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
