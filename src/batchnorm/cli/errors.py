"""What goes wrong, in a line."""

import contextlib
import errno
import signal
from collections.abc import Iterator

import typer

from batchnorm.errors import BatchNormError, lacking
from batchnorm.views.terminal import terminal


@contextlib.contextmanager
def said() -> Iterator[None]:
    """What a user can mend is said in a line, with exit status 2; an interruption has its own."""
    errors = terminal(stderr=True, soft_wrap=True)
    try:
        yield
    except BatchNormError as error:
        errors.print(f"batchnorm: {error}", markup=False)
        raise typer.Exit(2) from error
    except ModuleNotFoundError as error:
        errors.print(f"batchnorm: {lacking('the command', error)}", markup=False)
        raise typer.Exit(2) from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        errors.print(
            f"batchnorm: {error.strerror or error}{where}. What is recorded stays; the same "
            f"command goes on {REMEDIES.get(error.errno or 0, 'once that is mended')}.",
            markup=False,
        )
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing left to stop
        errors.print("batchnorm: interrupted. The same command goes on from the last checkpoint.")
        raise typer.Exit(130) from error


REMEDIES = {
    errno.ENOSPC: "once there is room",
    errno.EDQUOT: "once there is room",
    errno.EFBIG: "once larger files are allowed",
    errno.EACCES: "once it may write there",
    errno.EPERM: "once it may write there",
    errno.EROFS: "once it may write there",
    errno.EEXIST: "with another folder",
    errno.ENOTDIR: "with another folder",
    errno.EISDIR: "once the folder of that name is moved away",
}
