"""Tiny models are many times slower on two threads than on one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config):
    """Runs of a few steps of tiny models are what most tests are, and what the advice is against."""
    config.addinivalue_line("filterwarnings", "ignore:AdaCache. advice:UserWarning")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """With a GPU no worker beside this process: its memory and its time are not to be shared."""
    return 0 if torch.cuda.is_available() else None


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
