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
