"""A small Fashion-MNIST, and the places that it may come from."""

import functools
import gzip
import hashlib
import http.server
import threading

import numpy as np
import pytest

from batchnorm.lab import data

NAMES = [file.name for file in data.FILES]


def idx(array):
    """The file format of MNIST."""
    header = bytes([0, 0, 8, array.ndim])
    return header + np.array(array.shape, ">u4").tobytes() + array.tobytes()


GENERATOR = np.random.default_rng(0)
ARRAYS = [
    GENERATOR.integers(0, 256, (6, 28, 28), dtype=np.uint8),
    GENERATOR.integers(0, 10, 6, dtype=np.uint8),
    GENERATOR.integers(0, 256, (3, 28, 28), dtype=np.uint8),
    GENERATOR.integers(0, 10, 3, dtype=np.uint8),
]
CONTENTS = dict(zip(NAMES, map(idx, ARRAYS), strict=True))


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A Fashion-MNIST of nine images, and no place that has it."""
    files = tuple(
        data.File(name, hashlib.sha256(content).hexdigest()) for name, content in CONTENTS.items()
    )
    monkeypatch.setattr(data, "FILES", files)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "usr/share/datasets/fashion-mnist")
    monkeypatch.setattr(data, "MIRRORS", ("http://127.0.0.1:9/",) * 2)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()


@pytest.fixture(name="cache")
def cache_folder(tmp_path):
    return tmp_path / "cache"


def put(folder, level=9, **changed):
    """The four files, compressed; `changed` gives some of them other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in CONTENTS.items():
        written = changed.get(name.split("-")[0] + "_" + name.split("-")[1], content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(written, level))
    return folder


def is_ours(images):
    assert images.train_images.shape == (6, 1, 28, 28)
    np.testing.assert_allclose(images.train_images[:, 0] * 255, ARRAYS[0], rtol=1e-6)
    np.testing.assert_array_equal(images.train_labels, ARRAYS[1])
    np.testing.assert_allclose(images.test_images[:, 0] * 255, ARRAYS[2], rtol=1e-6)
    np.testing.assert_array_equal(images.test_labels, ARRAYS[3])
    return True


def flipped(content):
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


class Server:
    """A folder behind HTTP on this machine, and what was asked of it."""

    def __init__(self, folder):
        self.asked = asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_request(self, code="-", size="-"):  # noqa: ARG002
                asked.append(self.path)

            def log_message(self, *arguments):
                pass

        handler = functools.partial(Handler, directory=folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}/"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def apt(tmp_path, packaged, fails=False):
    """An apt-get and a dpkg-deb that find the package in a folder."""
    get = "exit 1" if fails else 'case "$*" in *download*) : > data.deb;; esac'
    said = "echo 'E: no such package' >&2;" if fails else ""
    target = f"{data.DEBIAN_FOLDER.relative_to('/')}"
    unpack = f'/bin/mkdir -p "$3/{target}" && /bin/cp "{packaged}"/* "$3/{target}"'
    for name, body in (("apt-get", said + get), ("dpkg-deb", unpack)):
        script(tmp_path, name, body)


def script(tmp_path, name, body):
    """A program on the PATH of `small`."""
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
