"""What the tests of the kernels stand on."""

import pytest
import torch

from batchnorm.kernels import native


@pytest.fixture(autouse=True, scope="module")
def however_few_values():
    """Our kernels, where torch's operator would be sooner, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "TINY", 0)
        yield


@pytest.fixture
def threads_kept():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
