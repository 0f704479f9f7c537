"""How the recipe of `batchnorm study fast` was chosen: by training images that were held out.

    python benchmarks/fast.py [--seeds 3] [--epochs 2,3,4] [--rates 0.1,0.3,0.5] [--threads 2]

Prints the mean accuracy on 5,000 held-out images over the seeds, and the median seconds. Chosen is
the smallest count of epochs whose mean is .01 above .90: what sampling 5,000 and 10,000 images
leaves open between the two (1.645 · √(.09/5,000 + .09/10,000) = .0085).
"""

import argparse
import itertools
import statistics

import torch

from batchnorm.lab.data import fashion_mnist
from batchnorm.lab.studies import probes
from batchnorm.lab.studies.fast import RECIPE

HELD_OUT = 5_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", default="2,3,4")
    parser.add_argument("--rates", default="0.1,0.3,0.5")
    parser.add_argument("--threads", type=int, default=RECIPE["threads"])
    arguments = parser.parse_args()
    images = fashion_mnist()
    torch.set_num_threads(arguments.threads)
    grid = itertools.product(
        map(int, arguments.epochs.split(",")), map(float, arguments.rates.split(","))
    )
    for epochs, rate in grid:
        found = []
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            found.append(
                probes.fast(
                    seed, images, epochs=epochs, batch_size=RECIPE["batch_size"],
                    learning_rate=rate, held_out_images=HELD_OUT,
                )
            )  # fmt: skip
        accuracy = statistics.fmean(each["accuracy"] for each in found)
        seconds = statistics.median(each["seconds"] for each in found)
        print(
            f"{epochs} epochs, rate {rate:g}: {accuracy:.4f} held out, {seconds:.1f} s", flush=True
        )


if __name__ == "__main__":
    main()
