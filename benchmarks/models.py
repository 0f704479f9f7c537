"""What the tools do to others' models: recalibrate, freeze, fold, export, convert; outputs compared.

    python benchmarks/models.py              all of them, about an hour on two cores: docs/models.md
    python benchmarks/models.py resnet18     those with this in their names, to the terminal

Weights are random (no hub is asked), weight and bias of the norms drawn from [0.5, 1.5], running
statistics those of the data that the model then sees, by `recalibrate`. Each number is a largest
difference of outputs ÷ the largest output; "–" stands for what torch or ONNX Runtime refused of the
model itself, too.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torchaudio
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm
import resuming
from batchnorm.model import exporting
from batchnorm.model.calling import feed, tensors

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "runs" / "models.jsonl"  # a line a model, so that a run that stops goes on
PAGE = ROOT / "docs" / "models.md"
HEAD = """\
# Others' models

What `recalibrate`, `freeze`, `fold`, an export and `convert` do to {models} models with {norms:,}
batch-norm layers: **{passed} of {models} pass**. {folded:,} layers are folded; {exported} folded models are
exported by `torch.export`, {onnx} run in ONNX Runtime. Made by `python benchmarks/models.py` with torch {torch},
torchvision {torchvision} and timm {timm}.

A model passes where every number in its row is rounding, below 1e-3 in float32 and below 1e-12 in float64,
and every norm became this library's layer and came back.

Weights are random (no hub is asked), weight and bias of the norms drawn from [0.5, 1.5], the running
statistics those of the data, by `recalibrate`; two samples in a batch. Each number is the largest
difference of the outputs ÷ the largest output; 0 means the same bits.

- **recalibrated**: layers that were called, and how far the means are from those of the same inputs
  in float64, in standard deviations (variances below 0.01 are then set to it, for random weights
  leave dead channels);
- **frozen**: `train()` of the frozen model against `eval()`;
- **folded**: layers, with a note on those that stay; **in float64**: the folded model against the
  model, both in float64;
- **torch.export**, **ONNX Runtime**: the folded model's export against the model, in float32; "–" where
  the model cannot be exported, folded or not (control flow by values, lists of images);
- **converted**: layers turned into this library's, and the difference; turned back, the outputs have
  the same bits and the modules the same classes, where nothing else is said;
- **fused**: norms that also do the activation or sum behind them, and the differences in `eval()` and
  in `train()` ("–" where training refuses one value per channel, or a detector no targets).
"""
COLUMNS = (
    "| model | input | norms | recalibrated | frozen | folded | in float64 | torch.export "
    "| ONNX Runtime | converted | fused |\n|---|---|---|---|---|---|---|---|---|---|---|"
)
SIDES = (64, 96, 128, 224, 256, 299)  # of the images, the smallest that the model takes


@dataclass
class Line:
    """What was found of one model."""

    group: str
    model: str
    input: str
    norms: int
    recalibrated: str  # layers, and the largest |mean − float64's mean| ÷ std
    frozen: str  # difference of train() from eval()
    folded: str  # layers
    left: str  # why the others stay
    difference: str  # of the folded model in float64
    exported: str  # torch.export
    onnx: str  # ONNX Runtime
    converted: str  # to this library's layers, and back to torch's
    fused: str  # with what follows them


# one of each family of timm's with batch norm, the smallest, and some more of the broad ones
TIMM = [
    "coatnet_pico_rw_224",
    "convmixer_768_32",
    "cpubone_nano",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "darknet53",
    "densenet121",
    "densenetblur121d",
    "dla34",
    "dla46x_c",
    "dpn48b",
    "ecaresnet26t",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientnet_b0",
    "efficientnet_es",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "fastvit_t8",
    "fbnetc_100",
    "gernet_s",
    "ghostnet_050",
    "halonet_h1",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "hrnet_w18_small_v2",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "legacy_seresnet18",
    "legacy_xception",
    "levit_128s",
    "lowformer_b0",
    "maxvit_pico_rw_256",
    "mixnet_s",
    "mnasnet_050",
    "mobilenetv2_035",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mobileone_s1",
    "mobilevit_xxs",
    "nextvit_small",
    "regnetx_002",
    "repghostnet_050",
    "repvgg_a0",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "resnet10t",
    "resnet18d",
    "resnetblur18",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "seresnext26d_32x4d",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "tf_efficientnetv2_b0",
    "tiny_vit_5m_224",
    "tresnet_m",
    "vgg11_bn",
    "visformer_tiny",
    "vit_small_resnet50d_s16_224",
    "volo_d1_224",
    "xception41p",
    "xcit_nano_12_p8_224",
]
SEGMENTATION = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet")  # fmt: skip
WITH_AUXILIARY = {"googlenet", "inception_v3"}

Build = Callable[[], nn.Module]


def classifier(name: str) -> nn.Module:
    """One of torchvision's."""
    options = {"init_weights": False} if name in WITH_AUXILIARY else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def detector(name: str) -> nn.Module:
    """One of torchvision's, for small images, which keeps detections of any score."""
    size = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 128}
    score = {"box_score_thresh": 0.0} if "rcnn" in name else {"score_thresh": 0.0}
    return built(torchvision.models.get_model, name, **size, **score)


def built(make: Callable[..., Any], name: str, **options: Any) -> nn.Module:
    """Without weights."""
    model: nn.Module = make(name, weights=None, weights_backbone=None, **options)
    return model


def all_models() -> dict[str, tuple[str, Build]]:
    """Name -> group and how to build it; torchvision's are all those with batch norm."""
    hub, listed = torchvision.models, torchvision.models.list_models
    audio: dict[str, Build] = {
        "Conformer": lambda: torchaudio.models.Conformer(
            40, 4, 64, 2, depthwise_conv_kernel_size=7
        ),
        "Tacotron2 postnet": lambda: torchaudio.models.Tacotron2().postnet,
        "WaveRNN": lambda: torchaudio.models.WaveRNN([5, 5, 8], 16, 200, n_freq=10, n_rnn=32),
    }
    found: list[tuple[str, str, Build]] = [
        *(("torchvision", name, partial(classifier, name)) for name in listed(module=hub)),
        *(("timm", f"timm {name}", partial(timm.create_model, name)) for name in TIMM),
        *(
            ("segmentation", name, partial(built, hub.get_model, name))
            for name in listed(module=hub.segmentation)
        ),
        *(
            (
                "segmentation",
                f"smp {name}",
                partial(getattr(smp, name), "resnet18", encoder_weights=None),
            )
            for name in SEGMENTATION
        ),
        *(("detection", name, partial(detector, name)) for name in listed(module=hub.detection)),
        *(
            ("video", name, partial(hub.get_model, name, weights=None))
            for name in listed(module=hub.video)
        ),
        *(("audio", f"torchaudio {name}", build) for name, build in audio.items()),
    ]
    return {name: (group, build) for group, name, build in found}


def inputs_for(group: str, model: nn.Module) -> tuple[Any, ...]:  # noqa: PLR0911  # a line a kind
    """Two samples that the model takes."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    name = type(model).__name__
    if name == "Conformer":
        return noise(2, 32, 40), torch.tensor([32, 20])
    if name == "_Postnet":
        return (noise(2, 80, 32),)
    if name == "WaveRNN":
        return noise(2, 1, 200 * 6), noise(2, 1, 10, 10)
    if group == "detection":
        return ([noise(3, 128, 128).sigmoid(), noise(3, 128, 96).sigmoid()],)
    if name == "Inception3":  # its other head, in training, takes no smaller one
        return (noise(2, 3, 299, 299),)
    if name == "S3D":
        return (noise(2, 3, 16, 224, 224),)
    if group == "video":
        return (noise(2, 3, 16, 64, 64),)
    for side in SIDES:
        x = noise(2, 3, side, side)
        with suppress(Exception), torch.no_grad():
            model(x)
            return (x,)
    raise ValueError(f"{name} takes no image of {SIDES}")


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that it gives."""
    with torch.no_grad():
        return tensors(feed(model, inputs))


def apart(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """Largest difference ÷ largest output; 0 means: the same bits."""
    if [y.shape for y in ours] != [y.shape for y in theirs]:
        return "other shapes"
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True) if b.numel()]
    if not pairs:
        return "no outputs"
    largest = max(float(b.abs().max()) for _, b in pairs)
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    return f"{worst / largest if largest else worst:.0e}" if worst else "0"


def shake(model: nn.Module) -> None:
    """Weight and bias of the norms as training may leave them."""
    generator = torch.Generator().manual_seed(2)
    for norm in norms(model):
        for parameter in (norm.weight, norm.bias):
            if parameter is not None:
                with torch.no_grad():
                    parameter.uniform_(0.5, 1.5, generator=generator)


def norms(model: nn.Module) -> list[_BatchNorm]:
    """Every batch-norm layer once."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def recalibrated(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Layers done, and their error: means against those of float64, in standard deviations."""
    means: dict[nn.Module, list[Tensor]] = {}

    def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        means.setdefault(layer, []).append(args[0].double().movedim(1, 0).flatten(1))

    hooks = [norm.register_forward_pre_hook(see) for norm in norms(model)]
    batchnorm.recalibrate(model, [inputs], forward=feed)
    for hook in hooks:
        hook.remove()
    worst = 0.0
    for norm in norms(model):
        if norm in means and norm.running_mean is not None and norm.running_var is not None:
            values = torch.cat(means[norm], 1)
            gap = (norm.running_mean.double() - values.mean(1)).abs()
            worst = max(worst, float((gap / (values.var(1) + norm.eps).sqrt()).max()))
    return f"{len(batchnorm.changes(model).done)}, {worst:.0e}"


def frozen(model: nn.Module, inputs: tuple[Any, ...], expected: list[Tensor]) -> str:
    """In training mode, all but the norms in evaluation mode: the outputs of eval()."""
    batchnorm.freeze(model).train()
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            module.training = False
    before = [b.clone() for b in model.buffers()]
    found = apart(outputs(model, inputs), expected)
    moved = any(not torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    batchnorm.unfreeze(model).eval()
    return "statistics moved" if moved else found


def converted(model: nn.Module, inputs: tuple[Any, ...], expected: list[Tensor]) -> str:
    """To this library's layers and back: the same outputs, the same keys."""
    keys = list(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    batchnorm.convert(model)
    count = len(batchnorm.changes(model).done)
    there = apart(outputs(model, inputs), expected)
    batchnorm.convert(model, to="torch")
    same = keys == list(model.state_dict()) and kinds == [type(m) for m in model.modules()]
    back = apart(outputs(model, inputs), expected)
    return f"{count}, {there}" + ("" if same and back == "0" else f"; back: {back}, same: {same}")


def fused(model: nn.Module, inputs: tuple[Any, ...], expected: list[Tensor]) -> str:
    """Norms that took something in, and the difference in evaluation and in training mode."""

    def training(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        with batchnorm.no_update(model.train()):
            return outputs(model, inputs)

    try:
        in_training = training(model)
    except (ValueError, AssertionError):  # one value per channel; detectors want targets
        in_training = []
    batchnorm.convert(model.eval(), fuse=True)
    count = batchnorm.changes(model).facts["fused"]
    found = apart(outputs(model, inputs), expected)
    there = apart(training(model), in_training) if in_training else "–"
    batchnorm.convert(model.eval(), to="torch")
    return f"{count}, {found}, {there}"


def exported(folded: nn.Module, inputs: tuple[Any, ...], expected: list[Tensor]) -> tuple[str, str]:
    """torch.export's program and ONNX Runtime, against the model that was not folded."""
    if not all(isinstance(x, Tensor) for x in inputs):
        return "–", "–"  # a list of images of several sizes
    program, onnx = "–", "–"
    with tempfile.TemporaryDirectory() as folder, suppress(Exception):
        path = Path(folder) / "model.onnx"
        exporting.to_onnx(folded, inputs, path)
        onnx = apart(exporting.run_onnx(path, inputs), expected)
    with tempfile.TemporaryDirectory() as folder, suppress(Exception):
        path = Path(folder) / "model.pt2"
        exporting.to_torch(folded, inputs, path)
        program = apart(exporting.run_torch(path, inputs), expected)
    return program, onnx


def examine(group: str, name: str, build: Build) -> Line | None:
    """Everything, on one model; None where there is no batch norm in it."""
    torch.manual_seed(0)
    model = build().eval()
    if not norms(model):
        return None
    inputs = inputs_for(group, model)
    shake(model)
    done = recalibrated(model, inputs)
    for norm in norms(model):
        if norm.running_var is not None:  # a channel that random weights left dead is not one that
            norm.running_var.clamp_(min=0.01)  # training leaves: 1 / √eps would be its factor
    expected = outputs(model, inputs)
    cold = frozen(model, inputs, expected)
    folded = batchnorm.fold(model, inputs)
    account = batchnorm.changes(folded)
    scale = account.facts["largest_output"] or 1.0
    program, onnx = exported(folded, inputs, expected)
    return Line(
        group=group, model=name, input=shape_of(inputs), norms=len(norms(model)),
        recalibrated=done, frozen=cold, folded=f"{len(account.done)}",
        left=reasons(account.left), difference=f"{account.facts['difference_in_float64'] / scale:.0e}",
        exported=program, onnx=onnx, converted=converted(model, inputs, expected),
        fused=fused(model, inputs, expected),
    )  # fmt: skip


def reasons(left: list[batchnorm.Change]) -> str:
    """Why layers stay, without their names, each reason with a count."""
    kinds = Counter(re.sub(r"\S+(?= (before|behind|beside) it)", "…", each.what) for each in left)
    return "; ".join(f"{count}: {kind}" for kind, count in kinds.most_common())


def shape_of(inputs: tuple[Any, ...]) -> str:
    """Of the first input."""
    first = inputs[0]
    if isinstance(first, Tensor):
        return "×".join(map(str, first.shape))
    return f"{len(first)} images"


def passes(line: Line) -> bool:
    """Every difference is rounding, and all norms were converted there and back."""
    count, *there = line.converted.split(", ")
    means = line.recalibrated.split(", ")[1:]
    found = [*means, line.frozen, line.exported, line.onnx, *there, *line.fused.split(", ")[1:]]
    return (
        int(count) == line.norms
        and all(_number(each) < 1e-3 for each in found if each != "–")
        and _number(line.difference) < 1e-12
    )


def _number(text: str) -> float:
    """A difference; what says something else, such as "other shapes", is none that passes."""
    try:
        return float(text)
    except ValueError:
        return float("inf")


def read_record() -> list[Line]:
    """What was found before."""
    return [Line(**line) for line in resuming.read(RECORD)]


def main() -> None:
    """Examine, record, write the page."""
    part = resuming.part_of(__doc__)
    looks = {
        name: partial(line_of, group, name, build) for name, (group, build) in all_models().items()
    }
    resuming.look(looks, RECORD, "model", part)
    if part is None:
        PAGE.write_text(page(read_record()), encoding="utf-8")


def line_of(group: str, name: str, build: Build) -> resuming.Line | None:
    """For the record."""
    line = examine(group, name, build)
    return None if line is None else asdict(line)


def page(lines: list[Line]) -> str:
    """The table as Markdown, a section a group."""
    text = [
        HEAD.format(
            torch=torch.__version__.partition("+")[0],
            torchvision=torchvision.__version__.partition("+")[0],
            timm=timm.__version__,
            models=len(lines),
            norms=sum(line.norms for line in lines),
            passed=sum(passes(line) for line in lines),
            folded=sum(int(line.folded) for line in lines),
            exported=sum(line.exported != "–" for line in lines),
            onnx=sum(line.onnx != "–" for line in lines),
        )
    ]
    for group in dict.fromkeys(line.group for line in lines):
        text.append(f"\n## {group.capitalize()}\n\n" + COLUMNS)
        notes: dict[str, int] = {}
        for line in (each for each in lines if each.group == group):
            note = ""
            if line.left:
                note = f" ({notes.setdefault(line.left, len(notes) + 1)})"
            text.append(
                f"| {line.model} | {line.input} | {line.norms} | {line.recalibrated} | {line.frozen} "
                f"| {line.folded}{note} | {line.difference} | {line.exported} | {line.onnx} "
                f"| {line.converted} | {line.fused} |"
            )
        text.append("")
        text += [f"{number}. {left}" for left, number in notes.items()]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
