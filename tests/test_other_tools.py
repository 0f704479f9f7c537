"""Others' tools for batch norm find our layers and do to them what they do to torch's."""

import copy
import warnings

import lightning
import pytest
import timm.layers
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import TorchSyncBatchNorm
from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils import fusion
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm

PAIRS = {
    "1d": (batchnorm.BatchNorm1d, nn.BatchNorm1d),
    "2d": (batchnorm.BatchNorm2d, nn.BatchNorm2d),
    "3d": (batchnorm.BatchNorm3d, nn.BatchNorm3d),
}
ours_and_torchs = pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)


def convolutional(norm):
    """Two convolutions with a norm behind each; the same numbers for every class of norm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), norm(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for value in (module.weight, module.running_mean, module.running_var):
                    value.uniform_(0.5, 2)
                module.bias.normal_()
    return model


def images(count=8):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@ours_and_torchs
def test_torch_converts_to_sync_and_keeps_the_state(ours, theirs):
    layer = ours(5, eps=1e-3, momentum=0.2)
    layer.running_mean.normal_()
    weight = layer.weight
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))[0]
    assert type(synced) is nn.SyncBatchNorm
    assert (synced.eps, synced.momentum) == (1e-3, 0.2)
    assert synced.weight is weight
    assert torch.equal(synced.running_mean, layer.running_mean)
    assert isinstance(layer, theirs)


def test_torch_fuses_it_into_a_convolution():
    model = convolutional(batchnorm.BatchNorm2d).eval()
    twin = convolutional(nn.BatchNorm2d).eval()
    fused = fusion.fuse_conv_bn_eval(model[0], model[1])
    expected = fusion.fuse_conv_bn_eval(twin[0], twin[1])
    assert torch.equal(fused.weight, expected.weight)
    x = images()
    torch.testing.assert_close(fused(x), model[1](model[0](x)), rtol=1e-5, atol=1e-5)


def test_torch_fuses_it_into_a_linear_layer():
    linear, norm = nn.Linear(6, 4).eval(), batchnorm.BatchNorm1d(4).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(5, 6)
    fused = fusion.fuse_linear_bn_eval(linear, norm)
    torch.testing.assert_close(fused(x), norm(linear(x)), rtol=1e-5, atol=1e-5)


def test_fx_traces_it_as_a_leaf():
    model = convolutional(batchnorm.BatchNorm2d).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == list("01234567")
    torch.testing.assert_close(traced(images()), model(images()), rtol=0, atol=0)


def test_fx_fusion_by_type_passes_it_by_and_never_drops_it():
    """It compares classes by equality, so no subclass is fused; the outputs stay the same."""
    model = convolutional(batchnorm.BatchNorm2d).eval()
    fused = optimization.fuse(copy.deepcopy(model))
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_update_bn_of_swa_gives_torchs_statistics():
    loader = [images()[:4], images()[4:]]
    found = []
    for norm in (batchnorm.BatchNorm2d, nn.BatchNorm2d):
        model = convolutional(norm)
        update_bn(loader, model)
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)
    assert found[0]["1.num_batches_tracked"] == 2


def test_averaged_models_copy_it():
    model = convolutional(batchnorm.BatchNorm2d)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    assert type(averaged.module[1]) is batchnorm.BatchNorm2d


def test_timm_freezes_it_and_frees_it():
    model = convolutional(batchnorm.BatchNorm2d).eval()
    expected = model(images())
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    kinds = [type(module).__name__ for module in frozen]
    assert kinds.count("FrozenBatchNorm2d") == 2
    torch.testing.assert_close(frozen(images()), expected, rtol=1e-5, atol=1e-5)
    freed = unfreeze_batch_norm_2d(frozen)
    assert isinstance(freed[1], nn.BatchNorm2d)
    torch.testing.assert_close(freed.eval()(images()), expected, rtol=1e-5, atol=1e-5)


def test_timm_converts_it_to_sync():
    synced = timm.layers.convert_sync_batchnorm(convolutional(batchnorm.BatchNorm2d))
    assert [type(synced[i]) for i in (1, 4)] == [nn.SyncBatchNorm] * 2


def test_timm_splits_it():
    split = timm.layers.convert_splitbn_model(convolutional(batchnorm.BatchNorm2d), num_splits=2)
    assert [type(split[i]) for i in (1, 4)] == [timm.layers.SplitBatchNorm2d] * 2


class Lightning(lightning.LightningModule):
    def __init__(self, norm):
        super().__init__()
        self.model = convolutional(norm)

    def training_step(self, batch, _index):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(norm, folder):
    """Two epochs, averaged from the first on; Lightning then refreshes the running statistics."""
    module = Lightning(norm)
    labels = torch.arange(8) % 2
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own: few workers, few batches
        trainer.fit(module, DataLoader(TensorDataset(images(), labels), batch_size=4))
    return module.state_dict()


def test_lightnings_weight_averaging_refreshes_its_statistics(tmp_path):
    ours, torchs = fit(batchnorm.BatchNorm2d, tmp_path), fit(nn.BatchNorm2d, tmp_path)
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-7)


def test_lightning_synchronizes_it_and_takes_it_back():
    plugin = TorchSyncBatchNorm()
    model = convolutional(batchnorm.BatchNorm2d)
    synced = plugin.apply(model)
    assert isinstance(synced[1], nn.SyncBatchNorm)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in plugin.revert(synced).modules())


def test_torch_ao_refuses_to_fuse_it_and_takes_it_back_as_torchs():
    model = convolutional(batchnorm.BatchNorm2d).eval()
    expected = model(images())
    with pytest.raises(AssertionError, match="did not find fuser method"):
        torch.ao.quantization.fuse_modules(copy.deepcopy(model), [["0", "1", "2"]])
    batchnorm.convert(model, to="torch")
    fused = torch.ao.quantization.fuse_modules(model, [["0", "1", "2"]])
    torch.testing.assert_close(fused(images()), expected, rtol=1e-5, atol=1e-5)


def test_torch_ao_passes_it_by_in_a_graph():
    model = convolutional(batchnorm.BatchNorm2d).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao has moved to torchao
        from torch.ao.quantization import quantize_fx

        fused = quantize_fx.fuse_fx(copy.deepcopy(model))
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_torch_export_holds_torchs_operator():
    model = convolutional(batchnorm.BatchNorm2d).eval()
    program = torch.export.export(model, (images(),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.batch_norm.default" in targets
    torch.testing.assert_close(program.module()(images()), model(images()), rtol=1e-5, atol=1e-5)
