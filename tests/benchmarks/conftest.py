"""What all performance cases share."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread a process, as the figures are stated for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
