"""Fashion-MNIST from every place it may come from, and what is said when a place fails."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from batchnorm import BatchNormError
from batchnorm.lab import data
from batchnorm.lab.data import Images, Loaders, fashion_mnist, load
from mirrors import (  # two of them are fixtures
    CONTENTS,
    NAMES,
    Server,
    apt,
    cache_folder,  # noqa: F401
    flipped,
    is_ours,
    put,
    small,  # noqa: F401
)


class TestTheOrder:
    def test_a_named_folder_comes_first(self, tmp_path, cache):
        put(cache, train_images=b"corrupt, and never looked at")
        assert is_ours(fashion_mnist(put(tmp_path / "mine"), cache=cache))

    def test_then_the_cache(self, tmp_path, cache):
        put(data.DEBIAN_FOLDER, train_images=b"corrupt, and never looked at")
        assert is_ours(fashion_mnist(cache=put(cache)))
        assert is_ours(fashion_mnist(tmp_path / "nowhere", cache=cache))

    def test_then_debians_folder(self, cache):
        put(data.DEBIAN_FOLDER)
        assert is_ours(fashion_mnist(cache=cache))
        assert not cache.exists()

    def test_then_a_mirror_and_the_next_time_the_cache(self, tmp_path, cache, monkeypatch):
        with Server(put(tmp_path / "mirror")) as mirror:
            monkeypatch.setattr(data, "MIRRORS", (mirror.url, "http://127.0.0.1:9/"))
            assert is_ours(fashion_mnist(cache=cache))
            assert len(mirror.asked) == 4
            assert is_ours(fashion_mnist(cache=cache))
            assert len(mirror.asked) == 4

    def test_then_debians_package(self, tmp_path, cache):
        apt(tmp_path, put(tmp_path / "packaged"))
        assert is_ours(fashion_mnist(cache=cache))
        assert is_ours(data._images(data._read(cache)))


@pytest.mark.parametrize("level", [0, 1, 9])
def test_files_that_were_compressed_anew_are_the_same_files(tmp_path, level, cache):
    assert is_ours(fashion_mnist(put(tmp_path / "mine", level=level), cache=cache))


def test_files_that_are_not_compressed_are_read_too(tmp_path, cache):
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    assert is_ours(fashion_mnist(tmp_path, cache=cache))


def test_a_mirror_with_a_flipped_bit_is_passed_over(tmp_path, cache, monkeypatch, caplog):
    bad = put(tmp_path / "bad", t10k_images=flipped(CONTENTS[NAMES[2]]))
    with Server(bad) as first, Server(put(tmp_path / "good")) as second:
        monkeypatch.setattr(data, "MIRRORS", (first.url, second.url))
        assert is_ours(fashion_mnist(cache=cache))
    assert "t10k-images-idx3-ubyte.gz is corrupt" in caplog.text
    assert is_ours(data._images(data._read(cache)))


def test_a_mirror_that_lacks_a_file_leaves_nothing_in_the_cache(tmp_path, cache, monkeypatch):
    folder = put(tmp_path / "mirror")
    (folder / f"{NAMES[3]}.gz").unlink()
    with Server(folder) as mirror:
        monkeypatch.setattr(data, "MIRRORS", (mirror.url,))
        with pytest.raises(BatchNormError, match=r"mirror http.*HTTPError"):
            fashion_mnist(cache=cache)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read"),
        (lambda path: path.write_bytes(b"<html>captive portal</html>"), "cannot be read"),
        (lambda path: path.write_bytes(gzip.compress(b"another file")), "is corrupt: SHA-256"),
        (lambda path: path.write_bytes(b""), "is corrupt: SHA-256"),
    ],
    ids=["cut", "not gzip", "another", "empty"],
)
def test_a_corrupt_file_in_the_named_folder_is_said(tmp_path, cache, spoil, said):
    folder = put(tmp_path / "mine")
    spoil(folder / f"{NAMES[1]}.gz")
    put(cache)
    with pytest.raises(BatchNormError, match=f"{NAMES[1]}.gz {said}.*leave out --data-dir"):
        fashion_mnist(folder, cache=cache)


def test_a_corrupt_cache_is_passed_over_and_mended(tmp_path, cache, monkeypatch, caplog):
    put(cache, train_labels=b"what a full disk left")
    with Server(put(tmp_path / "mirror")) as mirror:
        monkeypatch.setattr(data, "MIRRORS", (mirror.url,))
        assert is_ours(fashion_mnist(cache=cache))
    assert "looking elsewhere" in caplog.text
    assert is_ours(data._images(data._read(cache)))


def test_an_interrupted_copy_into_the_cache_is_not_taken_for_whole(tmp_path, cache, monkeypatch):
    copied = []

    def copyfile(source, target):
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(target)
        Path(target).write_bytes(Path(source).read_bytes())

    with Server(put(tmp_path / "mirror")) as mirror:
        monkeypatch.setattr(data, "MIRRORS", (mirror.url,))
        with monkeypatch.context() as patch:
            patch.setattr(data.shutil, "copyfile", copyfile)
            with pytest.raises(KeyboardInterrupt):
                fashion_mnist(cache=cache)
        asked = len(mirror.asked)
        assert is_ours(fashion_mnist(cache=cache))
        assert len(mirror.asked) == asked + 4


def test_a_cache_that_cannot_be_written_still_gives_the_images(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    with Server(put(tmp_path / "mirror")) as mirror:
        monkeypatch.setattr(data, "MIRRORS", (mirror.url,))
        assert is_ours(fashion_mnist(cache=tmp_path / "file" / "cache"))
    assert "cannot keep Fashion-MNIST in the cache" in caplog.text


def test_when_nothing_has_it_every_place_and_a_remedy_are_named(tmp_path, cache):
    apt(tmp_path, tmp_path, fails=True)
    with pytest.raises(BatchNormError) as caught:
        fashion_mnist(tmp_path / "mine", cache=cache)
    said = str(caught.value)
    for part in (
        f"--data-dir {tmp_path / 'mine'}: no such folder",
        f"the cache {cache}: no such folder",
        "the mirror http://127.0.0.1:9/: ConnectionError",
        "Debian's package dataset-fashion-mnist: apt-get failed (E: no such package)",
        "apt-get install dataset-fashion-mnist",
        f"{NAMES[0]}.gz",
    ):
        assert part in said


def test_a_path_that_cannot_be_looked_at_is_said(tmp_path, cache):
    with pytest.raises(BatchNormError, match=r"cannot be read .*File name too long"):
        fashion_mnist(tmp_path / ("x" * 300), cache=cache)


def test_an_apt_that_cannot_be_run_is_said(tmp_path, cache):
    apt(tmp_path, tmp_path)
    (tmp_path / "bin/apt-get").write_bytes(b"\x7fELF of another processor")
    with pytest.raises(BatchNormError, match=r"apt-get cannot be run .OSError"):
        fashion_mnist(cache=cache)


def test_a_missing_temporary_folder_is_said(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(BatchNormError, match=r"the mirror .*FileNotFoundError"):
        fashion_mnist(cache=cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_has_a_digest(dtype):
    parts = [torch.rand(4, 2, requires_grad=True).to(dtype), torch.zeros(4).long()] * 2
    assert len(Images(*parts).digest) == 64


def test_without_apt_that_is_said(cache):
    with pytest.raises(BatchNormError, match=r"Debian's package .*: no apt-get here"):
        fashion_mnist(cache=cache)


def test_the_real_images(monkeypatch):
    """As published: 60,000 and 10,000, a tenth of each in every class; mean .2860, std .3530."""
    monkeypatch.undo()
    images = fashion_mnist()
    assert images.train_images.shape == (60_000, 1, 28, 28)
    assert images.test_images.shape == (10_000, 1, 28, 28)
    assert images.train_images.dtype == torch.float32
    assert (images.train_images.min(), images.train_images.max()) == (0, 1)
    std, mean = torch.std_mean(images.train_images.double())
    assert (round(mean.item(), 4), round(std.item(), 4)) == (0.2860, 0.3530)
    assert images.train_labels.bincount().tolist() == [6000] * 10
    assert images.test_labels.bincount().tolist() == [1000] * 10
    assert images.train_labels[:5].tolist() == [9, 0, 0, 3, 0]


def wrong(**changed):
    parts = {
        "train_images": torch.rand(4, 1, 2, 2),
        "train_labels": torch.zeros(4).long(),
        "test_images": torch.rand(2, 1, 2, 2),
        "test_labels": torch.zeros(2).long(),
    }
    return lambda: Images(**(parts | changed))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (wrong(train_images=torch.zeros(4, 2).byte()), r"train data are images of torch.uint8.*\.float"),
        (wrong(test_labels=torch.zeros(2)), r"test data .* labels of torch.float32.*\.long"),
        (wrong(train_labels=torch.zeros(3).long()), r"images of shape \(4, 1, 2, 2\) and labels of shape \(3,\)"),
        (wrong(test_images=torch.rand(0, 1), test_labels=torch.zeros(0).long()), "N from 1"),
        (wrong(train_images=torch.tensor(1.0)), r"images of shape \(\) and labels.*index both alike"),
        (wrong(train_images=np.zeros((4, 2))), r"a ndarray and a Tensor.*torch\.as_tensor"),
        (lambda: load("tiny:two_tensors"), "returned a tuple; wanted are four tensors"),
        (lambda: load("tiny:two_strings"), "returned a tuple; wanted are four tensors"),
        (lambda: load("nowhere"), "no data called 'nowhere'"),
        (lambda: load("tiny:not_a_network"), "returned a int; wanted are four tensors"),
        (lambda: load("tiny:raises"), "data function tiny:raises raised KeyError"),
        (lambda: load("tiny:missing"), "missing"),
    ],
)  # fmt: skip
def test_data_of_ones_own_that_do_not_fit_are_said(make, said):
    with pytest.raises(BatchNormError, match=said):
        make()


def test_data_of_ones_own_are_tensors_or_loaders():
    assert isinstance(load("tiny:images"), Images)
    assert isinstance(load("tiny:as_images"), Images)
    assert isinstance(load("tiny:loaders"), Loaders)
