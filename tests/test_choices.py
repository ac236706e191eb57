"""The table of backends that "auto" may consult: what it says, and what it refuses to read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from whatwhere.attention import choices

HOPPER = "NVIDIA H200"


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's file that does not exist yet."""
    path = tmp_path / "settings" / "choices.json"
    monkeypatch.setenv(choices.VARIABLE, str(path))
    choices.forget()
    yield path
    choices.forget()


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "device": "some CPU",
        "head_dim": 64,
        "feature_dim": 128,
        "value_dim": 64,
        "min_length": 512,
        "max_length": 4096,
        "stage": "forward",
        "backend": "cpu",
        "measured": True,
        "source": "a test",
    } | changes


def test_shipped_choices_are_predictions_and_say_so() -> None:
    entries = choices.load(choices.SHIPPED)
    assert {e["device"] for e in entries} == {"NVIDIA H100", "NVIDIA H200"}
    for e in entries:
        assert e["measured"] is False and e["source"].startswith("predicted")


@pytest.mark.parametrize("stage", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    ("dim", "width", "backend"),
    [(64, None, "widened"), (128, None, "triton"), (128, 192, "widened")],
)
def test_what_is_predicted_for_hopper(
    dim: int, width: int | None, backend: str, stage: str
) -> None:
    for name in (HOPPER, "NVIDIA H100 80GB HBM3"):
        assert choices.best(name, dim, dim, 4096, stage, feature_dim=width) == backend
    assert choices.best("NVIDIA A100", dim, dim, 4096, stage, feature_dim=width) is None


def test_a_prediction_does_not_pass_for_a_measurement() -> None:
    assert choices.best(HOPPER, 64, 64, 4096, "forward") == "widened"
    assert choices.best(HOPPER, 64, 64, 4096, "forward", measured=True) is None
    choices.save([entry(device="H200", backend="triton")])
    assert choices.best(HOPPER, 64, 64, 4096, "forward", measured=True) == "triton"


def test_whether_decoding_was_measured_here() -> None:
    here = choices.device_name("cpu")
    guess = entry(device=here, backend="triton", stage="decode", measured=False)
    choices.save([entry(device=here, backend="triton"), guess])
    assert choices.measured_on("cpu", "triton", "forward")
    # Neither a prediction nor another stage of the same backend says that decoding is right.
    assert not choices.measured_on("cpu", "triton", "decode")
    choices.save([{**guess, "measured": True}])
    assert choices.measured_on("cpu", "triton", "decode")


def test_nothing_is_said_of_other_widths() -> None:
    assert choices.best(HOPPER, 80, 80, 4096, "forward") is None
    assert choices.best(HOPPER, 64, 32, 4096, "forward") is None


def test_the_users_entries_come_first_and_hold_within_their_lengths(mine: Path) -> None:
    assert choices.best(HOPPER, 64, 64, 2048, "forward") == "widened"
    written = choices.save([entry(device="H200", backend="flex"), entry()])
    assert written == mine == choices.user_file()
    assert choices.best(HOPPER, 64, 64, 2048, "forward") == "flex"
    assert choices.best(HOPPER, 64, 64, 8192, "forward") == "widened"
    assert choices.best(HOPPER, 64, 64, 2048, "forward+backward") == "widened"
    assert choices.best("some CPU", 64, 64, 512, "forward") == "cpu"
    assert choices.best("some CPU", 64, 64, 511, "forward") is None
    assert [p.name for p in mine.parent.iterdir()] == ["choices.json"]


def test_where_the_users_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choices.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert choices.user_file() == tmp_path / "whatwhere" / "choices.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choices.user_file() == tmp_path / ".config" / "whatwhere" / "choices.json"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_dim": "64"}, "head_dim is '64'"),
        ({"head_dim": True}, "head_dim is True"),
        ({"stage": 1}, "stage is 1"),
        ({"stage": "training"}, "expected one of"),
        ({"min_length": 0}, "at least 1"),
        ({"max_length": 7}, "max_length is below"),
        ({"backend": ""}, "must not be empty"),
        ({"speed": 3}, "expected a mapping with keys"),
    ],
)
def test_a_bad_entry_is_named_and_replaces_nothing(
    change: dict[str, Any], said: str, mine: Path
) -> None:
    choices.save([entry()])
    before = mine.read_bytes()
    with pytest.raises(ValueError, match=said):
        choices.save([entry(), entry(**change)])
    assert mine.read_bytes() == before
    mine.write_text(json.dumps({"entries": [entry(**change)]}))
    choices.forget()
    with pytest.raises(ValueError, match=f"choices.json: entry 0: .*{said}"):
        choices.best("some CPU", 64, 64, 512, "forward")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "is not JSON"), (b"[]", "expected a mapping"), (b"\xff\xfe", "cannot be read")],
)
def test_a_file_of_something_else_is_named(content: bytes, said: str, mine: Path) -> None:
    mine.parent.mkdir()
    mine.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        choices.best(HOPPER, 64, 64, 512, "forward")


def test_files_are_read_once(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices.best(HOPPER, 64, 64, 4096, "forward")

    def read(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(Path, "read_text", read)
    assert choices.best(HOPPER, 128, 128, 4096, "forward") == "triton"


def test_importing_reads_no_file() -> None:
    program = (
        "import torch, sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None)\n"
        "import whatwhere.attention.choices\n"
        "sys.exit(any('choices.json' in name for name in opened))\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_may_ask(dynamic: bool) -> None:
    choices.best(HOPPER, 64, 64, 64, "forward")

    def choose(x: torch.Tensor) -> torch.Tensor:
        name = choices.best(HOPPER, 64, 64, x.shape[0], "forward")
        return x + 1 if name == "widened" else x - 1

    compiled = torch.compile(choose, fullgraph=True, dynamic=dynamic, backend="eager")
    for length in (64, 256, 512):
        x = torch.zeros(length)
        assert torch.equal(compiled(x), choose(x))


def test_a_device_is_named_by_whole_words() -> None:
    choices.save([entry(device="NVIDIA A10"), entry(device="NVIDIA L4")])
    assert choices.best("NVIDIA A10", 64, 64, 512, "forward") == "cpu"
    assert choices.best("NVIDIA A100-SXM4-80GB", 64, 64, 512, "forward") is None
    assert choices.best("NVIDIA L40S", 64, 64, 512, "forward") is None


def test_a_folder_of_settings_that_nobody_can_read_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(choices.VARIABLE)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    choices.forget()
    assert choices.best(HOPPER, 64, 64, 4096, "forward") == "widened"
