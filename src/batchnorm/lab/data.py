"""The images: Fashion-MNIST, found or fetched and checked, or a user's own."""

import gzip
import hashlib
import logging
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pooch
import torch
from torch import Tensor

from batchnorm.errors import BatchNormError, brief
from batchnorm.lab import plugins

log = logging.getLogger("batchnorm")


@dataclass(frozen=True)
class Images:
    """Images in memory: (N, C, H, W) floating, in [0, 1] for Fashion-MNIST; labels: (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
                raise BatchNormError(
                    f"the {part} data are a {type(images).__name__} and a {type(labels).__name__}, "
                    "and should be tensors. Convert with torch.as_tensor."
                )
            if not images.is_floating_point() or labels.dtype != torch.int64:
                raise BatchNormError(
                    f"the {part} data are images of {images.dtype} and labels of {labels.dtype}, "
                    "and should be floating and int64. Convert with .float() and .long()."
                )
            if labels.dim() != 1 or not images.dim() or not len(images) == len(labels) > 0:
                raise BatchNormError(
                    f"the {part} data are images of shape {tuple(images.shape)} and labels of "
                    f"shape {tuple(labels.shape)}, and should be (N, ...) and (N,), N from 1. "
                    "A label for each image: index both alike."
                )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the shapes and bytes of all four."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            content = tensor.detach().contiguous().view(torch.uint8)  # NumPy has no bfloat16
            digest.update(content.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Loaders:
    """A user's own loaders: iterables, with a length, of (inputs, labels)."""

    train: Iterable[Any]
    test: Iterable[Any]


def load(spec: str, data_dir: Path | None = None) -> Images | Loaders:
    """`fashion-mnist`, or what `package.module:function` returns.

    The function returns four tensors (train images, train labels, test images, test labels), or
    two loaders (train, test).
    """
    if spec == "fashion-mnist":
        return fashion_mnist(data_dir)
    if ":" not in spec:
        raise BatchNormError(
            f"there is no data called {spec!r}. Known is fashion-mnist; your own is named as "
            "package.module:function."
        )
    try:
        found = plugins.resolve(spec, "data")()
    except BatchNormError:
        raise
    except Exception as error:
        raise BatchNormError(
            f"the data function {spec} raised {brief(error)}. Call it by itself to see where."
        ) from error
    return gather(found, f"the data function {spec} returned")


def gather(found: Any, said: str) -> Images | Loaders:
    """Four tensors or two loaders by their names; `said` begins the error about anything else."""
    match found:
        case Images() | Loaders():
            return found
        case (Tensor(), Tensor(), Tensor(), Tensor()):
            return Images(*found)
        case (train, test) if _is_loader(train) and _is_loader(test):
            return Loaders(train, test)
    raise BatchNormError(
        f"{said} a {type(found).__name__}; wanted are four tensors (train images, train labels, "
        "test images, test labels) or two loaders."
    )


def _is_loader(value: Any) -> bool:
    """A tensor and a string are iterable, too, and hold no batches."""
    return isinstance(value, Iterable) and not isinstance(value, Tensor | str | bytes)


# Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, https://arxiv.org/abs/1708.07747)


class File(NamedTuple):
    name: str
    sha256: str  # of the decompressed bytes: mirrors compress them differently


FILES = (
    File(
        "train-images-idx3-ubyte",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    File(
        "train-labels-idx1-ubyte",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    File(
        "t10k-images-idx3-ubyte",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    File(
        "t10k-labels-idx1-ubyte",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
CONNECT_SECONDS = 10
APT_SECONDS = 300


class Unavailable(Exception):  # noqa: N818  # not an error yet: the next place is tried
    """Why one place did not give the files."""


class Corrupt(Unavailable):
    """A file is there, and is not what it should be."""


def fashion_mnist(data_dir: Path | None = None, *, cache: Path | None = None) -> Images:
    """60,000 training and 10,000 test images of clothes, (N, 1, 28, 28) float32 in [0, 1].

    Looked for in `data_dir`, in the user's cache, in Debian's folder; then downloaded from the
    public mirrors, or taken from Debian's package, into the cache. Every file is checked by the
    SHA-256 of its decompressed bytes.

    Raises:
        BatchNormError: a corrupt file in `data_dir`; or no place has the files, with what each
            place said.
    """
    cache = cache if cache is not None else Path(pooch.os_cache("batchnorm")) / "fashion-mnist"
    places = _places(data_dir, cache)
    reasons = []
    for place, get in places:
        try:
            return _images(get())
        except Corrupt as reason:
            if data_dir is not None and place == _named(data_dir):
                raise BatchNormError(f"{reason}. Replace it, or leave out --data-dir.") from None
            log.warning("%s; looking elsewhere", reason)
            reasons.append(f"{place}: {reason}")
        except Unavailable as reason:
            reasons.append(f"{place}: {reason}")
        except OSError as error:  # no temporary folder, say
            reasons.append(f"{place}: {brief(error)}")
    raise BatchNormError(
        "Fashion-MNIST was not found and could not be fetched. Tried:\n  "
        + "\n  ".join(reasons)
        + f"\nInstall it with `apt-get install {DEBIAN_PACKAGE}`, or put "
        + ", ".join(f"{file.name}.gz" for file in FILES)
        + f" from {MIRRORS[-1]} into a folder and name it with --data-dir."
    )


def _named(data_dir: Path) -> str:
    return f"--data-dir {data_dir}"


def _places(data_dir: Path | None, cache: Path) -> list[tuple[str, Callable[[], list[bytes]]]]:
    """Each place's name, and a function that gives the files' bytes or says why not."""
    given = [] if data_dir is None else [(_named(data_dir), partial(_read, data_dir))]
    return [
        *given,
        (f"the cache {cache}", partial(_read, cache)),
        (f"Debian's folder {DEBIAN_FOLDER}", partial(_read, DEBIAN_FOLDER)),
        *((f"the mirror {url}", partial(_download, url, cache)) for url in MIRRORS),
        (f"Debian's package {DEBIAN_PACKAGE}", partial(_from_debian, cache)),
    ]


def _read(folder: Path) -> list[bytes]:
    """The four files of a folder, decompressed and checked."""
    return [_read_file(folder, file) for file in FILES]


def _read_file(folder: Path, file: File) -> bytes:
    for path in (folder / f"{file.name}.gz", folder / file.name):
        try:
            content = path.read_bytes()
            if path.suffix == ".gz":
                content = gzip.decompress(content)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, EOFError, zlib.error) as error:
            raise Corrupt(f"{path} cannot be read ({error})") from error
        found = hashlib.sha256(content).hexdigest()
        if found != file.sha256:
            raise Corrupt(f"{path} is corrupt: SHA-256 {found[:16]}…, wanted {file.sha256[:16]}…")
        return content
    raise Unavailable(f"no {file.name}.gz there" if folder.is_dir() else "no such folder")


def _download(url: str, cache: Path) -> list[bytes]:
    """Fetch from a mirror into the cache; a file arrives there whole and checked, or not at all."""
    fetch = pooch.HTTPDownloader(timeout=CONNECT_SECONDS)
    with tempfile.TemporaryDirectory(prefix="batchnorm-") as temporary:
        folder = Path(temporary)
        for file in FILES:
            name = f"{file.name}.gz"
            log.info("downloading %s%s", url, name)
            try:
                fetch(f"{url}{name}", str(folder / name), None)
            except (OSError, ValueError) as error:  # requests' errors are OSErrors
                raise Unavailable(f"{brief(error)[:140]}") from error
        return _keep(folder, cache)


def _from_debian(cache: Path) -> list[bytes]:
    """Unpack Debian's package into the cache; nothing is installed, and root is not needed."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unavailable("no apt-get here")
    with tempfile.TemporaryDirectory(prefix="batchnorm-") as temporary:
        folder = Path(temporary)
        for name in ("lists/partial", "archives/partial", "package"):
            (folder / name).mkdir(parents=True)
        # its own lists and caches: the system's are root's
        options = [f"-oDir::State::Lists={folder}/lists", f"-oDir::Cache={folder}"]
        options += ["-oAPT::Sandbox::User=", "-qq"]
        log.info("taking Fashion-MNIST from Debian's package %s", DEBIAN_PACKAGE)
        _run(["apt-get", *options, "update"], folder)
        _run(["apt-get", *options, "download", DEBIAN_PACKAGE], folder)
        archives = list(folder.glob("*.deb"))
        if not archives:
            raise Unavailable("apt-get download left no package")
        _run(["dpkg-deb", "-x", str(archives[0]), "package"], folder)
        return _keep(folder / "package" / DEBIAN_FOLDER.relative_to("/"), cache)


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(  # noqa: S603  # fixed programs, no shell
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=APT_SECONDS,
        )
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run ({brief(error)})") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["no message"]
        raise Unavailable(f"{command[0]} failed ({said[-1]})") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took more than {APT_SECONDS} s") from error


def _keep(folder: Path, cache: Path) -> list[bytes]:
    """Check the four files and put them into the cache, each in one move."""
    contents = _read(folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            partial_path = cache / f"{file.name}.gz.part"
            shutil.copyfile(folder / f"{file.name}.gz", partial_path)
            partial_path.replace(cache / f"{file.name}.gz")
            (cache / file.name).unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot keep Fashion-MNIST in the cache %s: %s", cache, error)
    return contents


def _images(contents: list[bytes]) -> Images:
    train_images, train_labels, test_images, test_labels = map(_parse, contents)
    return Images(
        _scaled(train_images), _labels(train_labels), _scaled(test_images), _labels(test_labels)
    )


def _parse(content: bytes) -> npt.NDArray[np.uint8]:
    """IDX: two zero bytes, 8 for unsigned bytes, the rank, a big-endian size per axis, the data."""
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _scaled(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(N, 28, 28) bytes -> (N, 1, 28, 28) in [0, 1]."""
    return torch.tensor(pixels)[:, None].float().div_(255)


def _labels(labels: npt.NDArray[np.uint8]) -> Tensor:
    return torch.tensor(labels).long()
