"""Rules about what a model is wrapped in, run on, and shipped as."""

from collections import Counter
from collections.abc import Iterator

from torch import distributed, nn

from batchnorm.checks.findings import Level
from batchnorm.checks.rules import Evidence, rule
from batchnorm.checks.subject import Subject
from batchnorm.model.discovery import SYNCHRONISED

PER_SAMPLE = {"GradSampleModule", "DPDDP", "DifferentiallyPrivateDistributedDataParallel"}


def _world() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


@rule(
    "BN025",
    "Every device keeps statistics of its own.",
    remedy="""
    batchnorm.convert(model, to="sync")  # one statistic of all devices
    model = DistributedDataParallel(model, broadcast_buffers=True)
    """,
)
def statistics_of_one_device(subject: Subject) -> Iterator[Evidence]:
    """DataParallel, or DistributedDataParallel without `broadcast_buffers`.

    DataParallel keeps the statistics of the first device's part of the batch and throws the others'
    away; DDP with `broadcast_buffers=False` leaves every process with its own, and which are saved
    depends on who saves.
    """
    if not any(True for _ in subject.tracking()):
        return
    for path, module in subject.model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids or []) > 1:
            yield Evidence(path, f"DataParallel on {len(module.device_ids)} devices")
        if isinstance(module, nn.parallel.DistributedDataParallel) and not module.broadcast_buffers:
            unsynced = [n for n, m in subject.tracking() if not isinstance(m, SYNCHRONISED)]
            if unsynced:
                yield Evidence(
                    path, f"broadcast_buffers=False with {len(unsynced)} unsynchronised norms"
                )


@rule(
    "BN026",
    "A synchronised norm that is not called in every step.",
    needs=("training",),
    remedy="""
    # call the layer in every step, on every process, and choose between the results
    y = torch.where(condition, branch(x), x)
    """,
)
def uneven_calls_of_sync(subject: Subject) -> Iterator[Evidence]:
    """Every process waits in a synchronised norm until all others have called it, too.

    Where a condition on the data decides whether it is called, a process that goes the other way
    leaves the rest waiting for ever, or answers the call of the next layer with its own. Seen from
    one process: in some steps it is called as often as the other synchronised norms, in others less
    (a last accumulation that is shorter shortens all alike, and is not meant). With a single
    synchronised norm in the model there is nothing to compare with, and its steps without a call
    are not seen.
    """
    seen = subject.training
    for layer, steps in (seen.synced if seen is not None else {}).items():
        shares: Counter[float] = Counter()
        for (count, most), times in steps.items():
            shares[count / most] += times
        if len(shares) < 2 or layer not in subject.names:
            continue
        usual = max(shares, key=lambda share: shares[share])
        text = (
            f"called {usual:.3g} times as often as the most called synchronised norm in "
            f"{shares[usual]} steps, not so in {shares.total() - shares[usual]}"
        )
        numbers = {"steps": shares.total(), "uneven": shares.total() - shares[usual]}
        yield Evidence(subject.names[layer], text, numbers)


@rule(
    "BN027",
    "A synchronised norm with nobody to synchronise with.",
    Level.NOTE,
    remedy='batchnorm.convert(model, to="torch")',
)
def lonely_sync(subject: Subject) -> Iterator[Evidence]:
    """SyncBatchNorm in a single process: it computes what BatchNorm does.

    On a CPU with torch.distributed running, torch's raises in training: an error.
    """
    for name, layer in subject.layers.items():
        if not isinstance(layer, SYNCHRONISED):
            continue
        on_cpu = layer.running_mean is not None and layer.running_mean.device.type == "cpu"
        if _world() > 1:
            if on_cpu and layer.training and isinstance(layer, nn.SyncBatchNorm):
                text = "SyncBatchNorm on a CPU: torch's takes GPU tensors only"
                yield Evidence(name, text, level=Level.ERROR)
        else:
            yield Evidence(name, "SyncBatchNorm in a single process")


@rule(
    "BN030",
    "It cannot be folded into a neighbour.",
    Level.NOTE,
    needs=("graph",),
    remedy="print(batchnorm.changes(batchnorm.fold(model.eval(), inputs)))  # why, layer by layer",
)
def unfoldable(subject: Subject) -> Iterator[Evidence]:
    """A norm whose neighbour feeds others too, is shared, or is called several times.

    Tools that pair layers by their order fold it all the same, and the outputs change. `fold` leaves
    it and says why; at deployment it costs its pass over the memory. A note.
    """
    for name, layer in subject.layers.items():
        calls = subject.traced.calls.get(layer, [])
        if not calls:
            continue
        sources = {call.source.module if call.source is not None else None for call in calls}
        if len(calls) > 1 and sources != {None} and len(sources) > 1:
            text = f"called {len(calls)} times, behind {len(sources)} layers"
            yield Evidence(name, text, {"calls": len(calls)})
        elif len(sources) == 1 and None not in sources:
            (source,) = sources
            uses = len(subject.traced.calls.get(source, [])) if source is not None else 0
            if uses > len(calls):
                text = f"the {type(source).__name__} before it is called {uses} times, the norm {len(calls)}"
                yield Evidence(name, text, {"uses": uses})


@rule(
    "BN032",
    "Batch norm where every sample has to stand for itself.",
    Level.ERROR,
    remedy="""
    batchnorm.convert(model, to="group")  # before the privacy engine takes the model
    """,
)
def per_sample_gradients(subject: Subject) -> Iterator[Evidence]:
    """A wrapper that takes gradients per sample (differential privacy) around batch norm.

    A sample's output depends on the others', so that its gradient is not its own, and the bound that
    privacy rests on does not hold.
    """
    for path, module in subject.model.named_modules():
        if type(module).__name__ in PER_SAMPLE:
            for name, layer in subject.layers.items():
                if not subject.frozen(layer):
                    yield Evidence(name, f"inside {type(module).__name__} ({path or 'the model'})")
