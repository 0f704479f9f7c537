"""Results of studies for the page, written without a cell being run."""

from batchnorm.lab import results

ENVIRONMENT = {"torch": "2.14", "processor": "a processor", "started": "2026-01-01T00:00:00+00:00"}
RATES = (0.1, 1.0, 10.0)
SEEDS = (0, 1, 2)


def write(folder, *made):
    """These results as a record; `trainings()` and `probes()` where none are given."""
    results.write(made or (probes(), trainings()), folder)
    return results.read(folder)


def accuracy(arm, rate, seed, epoch):
    """What an evaluation of a training says."""
    best = 0.7 if arm == "none" else 0.8 + 0.05 * (rate == 10.0)
    return 0.1 + (best - 0.1) * epoch / 2 + 0.01 * seed


def trainings(arms=("none", "batch")):
    """Two arms over a grid of rates; the arm without at the largest rate diverged at once."""
    return _result(
        "rates", "It allows larger rates.", arms,
        grid={"learning_rate": list(RATES)},
        cells=[_training(a, r, s) for s in SEEDS for r in RATES for a in arms],
        questions=[
            _question("higher", "supported", 0.1, (0.05, 0.15), {"low": 0, "high": None}, arms),
            _question("sooner", "contradicted", -0.2, (-0.3, -0.1), {"low": 0, "high": None}, arms),
            _question("same", "inconclusive", 0.01, (-0.1, 0.1), {"low": -0.05, "high": 0.05}, arms),
        ],
    )  # fmt: skip


def probes(name="growth", claim="Gradients explode.", curve="log_gradient", **changes):
    """Two arms of a probe, without a grid."""
    arms = ("deep", "batch")
    values = [(arm, seed, 1.0 + 0.2 * (arm == "batch")) for seed in SEEDS for arm in arms]
    return _result(
        name, claim, arms,
        grid={},
        cells=[
            {"arm": arm, "point": {}, "seed": seed, "hash": f"{arm}{seed}",
             "values": {"growth": value}, "curves": {curve: [value * k + 0.1 * seed for k in range(4)]}}
            for arm, seed, value in values
        ],
        questions=[_question("explodes", "supported", 1.2, (1.1, 1.3), {"low": None, "high": 2}, ())],
    ) | changes  # fmt: skip


PERCENTS = (1, 5, 15, 25, 35, 50, 65, 75, 85, 95, 99)
STEPS = (0, 10, 20)


def flows():
    """A probe of percentiles over the steps: uniform from −w to w, w = 1 + step; 100 at rate 10."""
    arms = ("none", "batch")
    return _result(
        "flow", "Inputs stay.", arms,
        grid={"learning_rate": [1.0, 10.0]},
        cells=[_flow(arm, rate, seed) for seed in SEEDS for rate in (1.0, 10.0) for arm in arms],
        questions=[_question("steadier", "supported", 1.2, (1.1, 1.3), {"low": 0, "high": None}, arms)],
    )  # fmt: skip


def _flow(arm, rate, seed):
    widths = [100.0 if rate == 10.0 else 1.0 + step for step in STEPS]
    curves = {"step": list(STEPS), "test_accuracy": [0.1, 0.5, 0.8]}
    curves |= {
        f"percentile {p}": [width * (p / 50 - 1) + seed for width in widths] for p in PERCENTS
    }
    curves |= {
        name: [width * (p / 50 - 1) for width in widths]
        for name, p in (("low", 15), ("middle", 50), ("high", 85))
    }
    return {
        "arm": arm, "point": {"learning_rate": rate}, "seed": seed, "hash": f"{arm}{rate}{seed}",
        "values": {"accuracy": 0.8}, "curves": curves,
    }  # fmt: skip


def _training(arm, rate, seed):
    epochs = [0.0] if (arm, rate) == ("none", 10.0) else [0.0, 1.0, 2.0]
    tested = [accuracy(arm, rate, seed, epoch) for epoch in epochs]
    values = {"test_accuracy": tested[-1], "diverged": float(len(epochs) == 1), "train_loss": None}
    curves = {
        "epoch": epochs,
        "test_accuracy": tested,
        "train_loss": [None, 1.5, 0.5][: len(epochs)],
    }
    return {
        "arm": arm, "point": {"learning_rate": rate}, "seed": seed, "hash": f"{arm}{rate}{seed}",
        "values": values, "curves": curves,
    }  # fmt: skip


def _question(name, verdict, effect, interval, rule, arms):
    return {
        "name": name, "claim": {"en": f"It is {name}.", "zh": f"论断 {name}。"}, "rule": rule,
        "verdict": verdict, "effect": effect, "interval": list(interval), "p": 0.01,
        "p_adjusted": 0.02, "seeds": len(SEEDS), "exploratory": False,
        "per_seed": {str(seed): effect + 0.03 * (seed - 1) for seed in SEEDS},
        "points": {arm: {"learning_rate": 1.0} for arm in arms},
    }  # fmt: skip


def _result(name, claim, arms, **parts):
    return {
        "format": results.FORMAT, "name": name, "claim": {"en": claim, "zh": f"中文：{claim}"},
        "source": "a paper", "size": "quick", "seeds": list(SEEDS), "environment": ENVIRONMENT,
        "common": {},
        "arms": [{"name": a, "label": {"en": f"arm {a}", "zh": f"组 {a}"}, "changes": {}} for a in arms],
        "missing": [], "power": {"smallest_p": 0.25, "detectable": None}, **parts,
    }  # fmt: skip
