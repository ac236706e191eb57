"""Fixtures for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill `torch.empty` with NaN, so that a result which reads unwritten memory is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of small real data, or a skip that says how to name it."""
    folder = Path(os.environ.get("WHATWHERE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no sample data in {folder}; set WHATWHERE_DATA to a folder that has it")
    return folder
