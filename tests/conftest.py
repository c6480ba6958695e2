import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))

import pytest
import torch


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)
