"""`whatwhere bench --calibrate`: the user's table of choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whatwhere.attention import choices
from whatwhere.cli import main

OPTIONS = [
    *("bench", "--calibrate", "--device", "cpu", "--batch", "1", "--heads", "2"),
    *("--head-dim", "8", "--rounds", "2", "--backends", "sdpa", "cpu"),
]


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = tmp_path / "mine.json"
    monkeypatch.setenv(choices.VARIABLE, str(path))
    choices.forget()
    yield path
    choices.forget()


def test_every_length_has_a_measured_choice(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OPTIONS, "--lengths", "16", "64"]) == 0
    assert f"choices: {mine}" in capsys.readouterr().out
    entries = choices.load(mine)
    assert len(entries) == 12  # two widths of scores, two lengths, three stages
    for entry in entries:
        assert entry["measured"] and "--calibrate" in entry["source"]
        assert (entry["min_length"], entry["max_length"]) in ((1, 32), (33, None))
    name = choices.device_name("cpu")
    for stage in choices.STAGES:
        for width in (12, 16):
            for length in (1, 32, 33, 10**6):
                found = choices.best(name, 8, 8, length, stage, feature_dim=width)
                assert found in ("sdpa", "cpu")
    assert choices.best("another device", 8, 8, 64, "forward") is None


def test_other_devices_and_widths_are_kept(mine: Path) -> None:
    assert main([*OPTIONS, "--lengths", "16", "--passes", "forward"]) == 0
    other = {**choices.load(mine)[0], "device": "NVIDIA H200", "backend": "triton"}
    choices.save([*choices.load(mine), other])
    assert main([*OPTIONS, "--lengths", "32", "--passes", "forward"]) == 0
    entries = choices.load(mine)
    assert other in entries and len(entries) == 3
    assert all("(1, 2, 32, 8)" in e["source"] for e in entries if e != other)


def test_a_file_of_something_else_is_not_replaced(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.write_text(json.dumps({"my": "file"}))
    assert main([*OPTIONS, "--lengths", "16"]) == 2
    assert "mine.json: expected a mapping whose 'entries'" in capsys.readouterr().err
    assert json.loads(mine.read_text()) == {"my": "file"}
