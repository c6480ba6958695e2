import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("other_process", "training_helpers", "weights_helpers")  # they assert, too
collect_ignore = ["scripts"]  # what users write, for test_run.py


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.fixture
def gates_without_noise(monkeypatch):
    """Every noise is one half."""
    monkeypatch.setattr(torch, "rand_like", lambda like, **_: torch.full_like(like, 0.5))
