"""What every test runs under."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Weights that a test leaves to torch's default initialisation do not depend on the tests before it."""
    torch.manual_seed(0)
