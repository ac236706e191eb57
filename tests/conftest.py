"""Fixtures for every test."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from triton_interpreter import patch_once_for_each_kernel

# Without a GPU, Triton's kernels are tested in its interpreter. It reads this when they are made.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        patch_once_for_each_kernel()

# Nothing is downloaded in tests; the hub's clients read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` gives with NaN, so that a result that reads unwritten memory shows.

    PyTorch fills only while its deterministic mode is on.
    """
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of small real data, or a skip that says how to name it."""
    folder = Path(os.environ.get("WHATWHERE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no sample data in {folder}; set WHATWHERE_DATA to a folder that has it")
    return folder


@pytest.fixture
def no_bars() -> Iterator[None]:
    """The bars of transformers off: the command line turns them off before it is imported."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if shown:
        logging.enable_progress_bar()
