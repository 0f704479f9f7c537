"""Where data come from, closer: who is asked and who is not, broken downloads, apt's every step.

What each place gives when all is well, and what is said when all fail, is in test_finding_data.
"""

import gzip
import hashlib
import http.server
import itertools
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
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
    script,
    small,  # noqa: F401
)

ORDER = ["named", "cache", "folder", "first mirror", "second mirror", "package"]
KEPT = {f"{name}.gz" for name in NAMES}


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.fixture
def places(tmp_path, cache, monkeypatch):
    """All six places, empty, by name."""
    folders = {
        "named": tmp_path / "named",
        "cache": cache,
        "folder": data.DEBIAN_FOLDER,
        "first mirror": tmp_path / "first",
        "second mirror": tmp_path / "second",
        "package": tmp_path / "packaged",
    }
    apt(tmp_path, folders["package"])
    with Server(folders["first mirror"]) as first, Server(folders["second mirror"]) as second:
        monkeypatch.setattr(data, "MIRRORS", (first.url, second.url))
        yield folders


@pytest.fixture
def asked(places, monkeypatch):
    """The places, in the order in which they are turned to."""
    seen = []

    def spy(function, name_of):
        def spied(*arguments):
            seen.append(name_of(arguments))
            return function(*arguments)

        return spied

    local = {folder: name for name, folder in places.items()}
    mirrors = dict(zip(data.MIRRORS, ("first mirror", "second mirror"), strict=True))
    monkeypatch.setattr(data, "_read", spy(data._read, lambda given: local.get(given[0])))
    monkeypatch.setattr(data, "_download", spy(data._download, lambda given: mirrors[given[0]]))
    monkeypatch.setattr(data, "_from_debian", spy(data._from_debian, lambda _: "package"))
    return lambda: [name for name in seen if name]


@pytest.mark.parametrize("whole", ORDER)
def test_the_first_place_that_is_whole_is_the_last_that_is_asked(places, asked, whole):
    for name in ORDER[ORDER.index(whole) :]:
        put(places[name])
    assert is_ours(fashion_mnist(places["named"], cache=places["cache"]))
    assert asked() == ORDER[: ORDER.index(whole) + 1]
    assert names(places["cache"]) == (set() if whole == "folder" else KEPT)


@pytest.mark.parametrize("incomplete", ORDER[:-1])
def test_a_place_that_lacks_one_file_is_passed_over_whole(places, asked, incomplete):
    put(places[incomplete])
    (places[incomplete] / f"{NAMES[3]}.gz").unlink()
    put(places["package"])
    assert is_ours(fashion_mnist(places["named"], cache=places["cache"]))
    assert asked() == ORDER
    assert names(places["cache"]) == KEPT


def test_without_a_named_folder_the_users_cache_is_first(places, asked, monkeypatch, tmp_path):
    monkeypatch.setattr(data.pooch, "os_cache", lambda project: tmp_path / "home" / project)
    put(places["first mirror"])
    assert is_ours(load("fashion-mnist"))
    assert names(tmp_path / "home" / "batchnorm" / "fashion-mnist") == KEPT
    assert asked() == ["folder", "first mirror"]


def test_load_hands_the_named_folder_on(places, asked):
    assert is_ours(load("fashion-mnist", put(places["named"])))
    assert asked() == ["named"]


class Breaking(Server):
    """A mirror that answers with the first part of each file, or late, or with an error."""

    def __init__(self, folder, how):
        super().__init__(folder)
        self.ended = threading.Event()
        ended = self.ended

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = (folder / self.path[1:]).read_bytes()
                if how == "silent":
                    ended.wait(30)
                    return
                self.send_response(503 if how == "busy" else 200)
                if how == "hangs up":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])

            def log_message(self, *arguments):
                pass

        self.server.RequestHandlerClass = Handler

    def __exit__(self, *exception):
        self.ended.set()
        super().__exit__(*exception)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("hangs up", r"ChunkedEncodingError"),
        ("ends early", r"train-images-idx3-ubyte.gz cannot be read \(.*end-of-stream"),
        ("busy", r"HTTPError: 503"),
        ("silent", r"ReadTimeout"),
    ],
)
def test_a_download_that_breaks_leaves_no_file_and_the_next_mirror_is_asked(
    places, monkeypatch, tmp_path, how, said
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(data, "CONNECT_SECONDS", 1)
    with Breaking(put(tmp_path / "breaking"), how) as breaking:
        good = data.MIRRORS[1]
        monkeypatch.setattr(data, "MIRRORS", (breaking.url,))
        with pytest.raises(BatchNormError, match=f"the mirror {breaking.url}: .*{said}"):
            fashion_mnist(cache=places["cache"])
        assert not places["cache"].exists()
        assert not names(scratch)
        put(places["second mirror"])
        monkeypatch.setattr(data, "MIRRORS", (breaking.url, good))
        assert is_ours(fashion_mnist(cache=places["cache"]))
    assert names(places["cache"]) == KEPT
    assert not names(scratch)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda name: gzip.compress(flipped(CONTENTS[name])),
        lambda name: flipped(gzip.compress(CONTENTS[name])),
        lambda name: gzip.compress(CONTENTS[name])[:10] + b"\xff" * 20,
        lambda name: gzip.compress(CONTENTS[name])[:-1],
        lambda name: gzip.compress(CONTENTS[name]) + b"and more",
        lambda name: gzip.compress(CONTENTS[name] + b"\0"),
        lambda name: CONTENTS[name],
        lambda _: b"",
    ],
    ids=[
        "flipped inside",
        "flipped",
        "no deflate",
        "cut",
        "longer",
        "longer inside",
        "not gzip",
        "empty",
    ],
)
@pytest.mark.parametrize("name", [NAMES[0], NAMES[2]])
def test_corrupt_bytes_from_a_mirror_are_never_kept(places, asked, caplog, spoil, name):
    put(places["first mirror"])
    (places["first mirror"] / f"{name}.gz").write_bytes(spoil(name))
    put(places["second mirror"], level=1)
    assert is_ours(fashion_mnist(cache=places["cache"]))
    assert asked() == ["cache", "folder", "first mirror", "second mirror"]
    assert f"{name}.gz" in caplog.text
    for kept, content in CONTENTS.items():
        assert gzip.decompress((places["cache"] / f"{kept}.gz").read_bytes()) == content


def test_a_copy_that_was_killed_half_way_is_written_over(places, asked):
    put(places["cache"])
    (places["cache"] / f"{NAMES[1]}.gz").rename(places["cache"] / f"{NAMES[1]}.gz.part")
    put(places["second mirror"])
    assert is_ours(fashion_mnist(cache=places["cache"]))
    assert asked()[-1] == "second mirror"
    assert names(places["cache"]) == KEPT


def test_a_corrupt_file_without_gz_in_the_cache_does_not_stay(places):
    places["cache"].mkdir()
    (places["cache"] / NAMES[0]).write_bytes(b"corrupt")
    put(places["first mirror"])
    assert is_ours(fashion_mnist(cache=places["cache"]))
    assert names(places["cache"]) == KEPT


def test_when_all_is_corrupt_every_place_is_named_once(places):
    for name in ORDER[1:]:
        put(places[name], train_labels=b"corrupt")
    with pytest.raises(BatchNormError) as caught:
        fashion_mnist(cache=places["cache"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "Fashion-MNIST was not found and could not be fetched. Tried:"
    said = [
        f"the cache {places['cache']}",
        f"Debian's folder {places['folder']}",
        *(f"the mirror {url}" for url in data.MIRRORS),
        "Debian's package dataset-fashion-mnist",
    ]
    for line, place in zip(lines[1:-1], said, strict=True):
        assert line.startswith(f"  {place}: ")
        assert f"{NAMES[1]}.gz is corrupt: SHA-256 " in line
    assert lines[-1].startswith("Install it with `apt-get install dataset-fashion-mnist`, or put ")
    assert all(f"{name}.gz" in lines[-1] for name in NAMES)


def test_apt_works_in_a_folder_of_its_own_which_is_gone_afterwards(places, tmp_path):
    put(places["package"])
    log = tmp_path / "log"
    for name in ("apt-get", "dpkg-deb"):
        body = (tmp_path / "bin" / name).read_text()
        script(tmp_path, name, f'echo "$PWD {name} $*" >> "{log}"\n{body}')
    assert is_ours(fashion_mnist(cache=places["cache"]))
    update, download, unpack = log.read_text().splitlines()
    folder = update.split()[0]
    own = f"-oDir::State::Lists={folder}/lists -oDir::Cache={folder} -oAPT::Sandbox::User= -qq"
    assert update == f"{folder} apt-get {own} update"
    assert download == f"{folder} apt-get {own} download dataset-fashion-mnist"
    assert unpack == f"{folder} dpkg-deb -x {folder}/data.deb package"
    assert folder.startswith(tempfile.gettempdir())
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("apt-get", "echo W: first >&2; echo E: last >&2; exit 100", r"apt-get failed \(E: last\)"),
        ("apt-get", "exit 100", r"apt-get failed \(no message\)"),
        ("apt-get", "exec /bin/sleep 30", "apt-get took more than 0.3 s"),
        ("apt-get", "exit 0", "apt-get download left no package"),
        ("dpkg-deb", "echo broken archive >&2; exit 2", r"dpkg-deb failed \(broken archive\)"),
        ("dpkg-deb", "exit 0", "no such folder"),
    ],
)
def test_what_apt_cannot_do_is_said(places, tmp_path, monkeypatch, name, body, said):
    put(places["package"])
    script(tmp_path, name, body)
    if "sleep" in body:
        monkeypatch.setattr(data, "APT_SECONDS", 0.3)
    with pytest.raises(BatchNormError, match=f"Debian's package dataset-fashion-mnist: {said}"):
        fashion_mnist(cache=places["cache"])
    assert not places["cache"].exists()


@pytest.mark.parametrize("missing", ["apt-get", "dpkg-deb"])
def test_half_of_apt_is_no_apt(places, tmp_path, missing):
    put(places["package"])
    (tmp_path / "bin" / missing).unlink()
    with pytest.raises(BatchNormError, match="no apt-get here"):
        fashion_mnist(cache=places["cache"])


def test_the_package_gives_the_images_where_the_cache_cannot_be_written(places, tmp_path, caplog):
    put(places["package"])
    (tmp_path / "file").touch()
    assert is_ours(fashion_mnist(cache=tmp_path / "file"))
    assert f"cannot keep Fashion-MNIST in the cache {tmp_path / 'file'}: " in caplog.text


PARTS = ("train_images", "train_labels", "test_images", "test_labels")


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("images", "labels", "got", "want"),
    [
        ((4, torch.int64), (4, torch.int64), "images of torch.int64", "Convert with .float()"),
        ((4, torch.float32), (4, torch.int32), "labels of torch.int32", "Convert with .float()"),
        ((4, torch.float32), ((4, 1), torch.int64), "shape (4, 1)", "should be (N, ...) and (N,)"),
        ((4, torch.float32), ((), torch.int64), "shape ()", "should be (N, ...) and (N,)"),
        ((4, torch.float32), (5, torch.int64), "shape (5,)", "should be (N, ...) and (N,)"),
        ((0, torch.float32), (0, torch.int64), "shape (0,)", "N from 1"),
    ],
)
def test_images_say_which_part_does_not_fit_what_it_is_and_what_it_should_be(
    part, images, labels, got, want
):
    wrong = [torch.zeros(shape, dtype=dtype) for shape, dtype in (images, labels)]
    right = [torch.zeros(3, 1, 2, 2), torch.zeros(3).long()]
    with pytest.raises(BatchNormError) as caught:
        Images(*(wrong + right if part == "train" else right + wrong))
    said = str(caught.value)
    assert said.startswith(f"the {part} data are images of ")
    assert got in said
    assert want in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_digest_is_of_shapes_types_and_bytes(dtype):
    train, labels, test, test_labels = tiny.images(20, 10)
    ours = Images(train.to(dtype), labels, test.to(dtype), test_labels)
    expected = hashlib.sha256()
    for tensor, kind in (
        (ours.train_images, str(dtype)),
        (labels, "torch.int64"),
        (ours.test_images, str(dtype)),
        (test_labels, "torch.int64"),
    ):
        expected.update(f"({tuple(tensor.shape)}, {kind})".encode())
        expected.update(np.ascontiguousarray(tensor).tobytes())
    assert ours.digest == expected.hexdigest()


def test_other_data_have_another_digest_and_another_layout_has_not():
    train, labels, test, test_labels = tiny.images(20, 10)
    other = train.clone()
    other[3, 0, 5, 5] += 0.25
    turned = train.transpose(2, 3).contiguous().transpose(2, 3)
    ours, same, *others = (
        Images(*parts).digest
        for parts in (
            (train, labels, test, test_labels),
            (turned, labels, test, test_labels),
            (other, labels, test, test_labels),
            (train.flatten(1), labels, test, test_labels),
            (train, labels.flip(0), test, test_labels),
            (train, labels, test, test_labels.flip(0)),
        )
    )
    assert ours == same
    assert all(a != b for a, b in itertools.combinations([ours, *others], 2))


@pytest.fixture
def returns(monkeypatch):
    """What `tiny:mine` gives, or raises."""

    def set_up(function):
        monkeypatch.setattr(tiny, "mine", function, raising=False)
        return "tiny:mine"

    return set_up


@pytest.mark.parametrize("kind", [tuple, list])
def test_four_tensors_keep_their_places(returns, kind):
    tensors = kind(tiny.images(20, 10))
    images = load(returns(lambda: tensors))
    assert isinstance(images, Images)
    for part, tensor in zip(PARTS, tensors, strict=True):
        assert getattr(images, part) is tensor


def test_images_and_loaders_come_as_they_are(returns):
    images, pair = tiny.as_images(), tiny.loaders()
    ready = Loaders(*pair)
    assert load(returns(lambda: images)) is images
    assert load(returns(lambda: ready)) is ready
    loaded = load(returns(lambda: pair))
    assert isinstance(loaded, Loaders)
    assert (loaded.train, loaded.test) == pair


def test_tensors_that_do_not_fit_are_said_through_load_too(returns):
    train, labels, test, test_labels = tiny.images(20, 10)
    with pytest.raises(BatchNormError, match=r"train data are images of torch.uint8 and labels"):
        load(returns(lambda: (train.byte(), labels, test, test_labels)))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (None, "NoneType"),
        ({"train": [], "test": []}, "dict"),
        ((), "tuple"),
        ([torch.zeros(2, 1), torch.zeros(2).long()] * 3, "list"),
        ((3, []), "tuple"),
        ((np.zeros((2, 1)), np.zeros(2)) * 2, "tuple"),
    ],
)
def test_whatever_else_a_function_returns_is_said_by_its_type(returns, given, kind):
    with pytest.raises(BatchNormError) as caught:
        load(returns(lambda: given))
    assert str(caught.value) == (
        f"the data function tiny:mine returned a {kind}; wanted are four tensors (train "
        "images, train labels, test images, test labels) or two loaders."
    )


def test_what_a_function_raises_is_said_and_stays_the_cause(returns):
    def raises():
        raise FileNotFoundError("no such shard.\nand more")

    with pytest.raises(BatchNormError) as caught:
        load(returns(raises))
    assert str(caught.value) == (
        "the data function tiny:mine raised FileNotFoundError: no such shard. "
        "Call it by itself to see where."
    )
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_batchnorm_error_of_a_function_is_left_as_it_is(returns):
    error = BatchNormError("mine.")

    def raises():
        raise error

    with pytest.raises(BatchNormError) as caught:
        load(returns(raises))
    assert caught.value is error


def test_a_function_is_looked_for_by_module_and_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaks_on_import.py").write_text("1 / 0\n")
    (tmp_path / "holds_a_number.py").write_text("images = 3\n")
    for spec, said in (
        ("mnist", "there is no data called 'mnist'. Known is fashion-mnist"),
        ("tiny:", "the data 'tiny:' should be named as package.module:function."),
        (":images", "the data ':images' should be named as package.module:function."),
        ("no_such_module:f", "importing no_such_module raised ModuleNotFoundError"),
        ("breaks_on_import:f", "importing breaks_on_import raised ZeroDivisionError"),
        ("holds_a_number:images", "should be a function, but holds_a_number has a int. Define"),
        ("holds_a_number:other", "but holds_a_number has none of that name. Define other there"),
    ):
        with pytest.raises(BatchNormError) as caught:
            load(spec)
        assert said in str(caught.value)
