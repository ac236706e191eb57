from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

import whatwhere
from whatwhere.cli import main
from whatwhere.lab import commands, recipes
from whatwhere.lab.commands import Compare, Train, parse
from whatwhere.lab.storage import DiskFullError

SMALL = [
    *("--training.steps", "3", "--training.batch-size", "2", "--training.warmup-steps", "1"),
    *("--model.hidden-size", "16", "--model.num-hidden-layers", "1"),
    *("--data.length", "32", "--evaluation.lengths", "32", "64", "--evaluation.tokens", "128"),
    *("--evaluation.examples", "4", "--training.validation-sequences", "4"),
]


@pytest.fixture
def words(tmp_path: Path) -> str:
    """Some text to train on."""
    for name in ("one", "two"):
        path = tmp_path / "words" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"what stands where, and what is said of it there, {name} " * 60)
    return str(path.parent)


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that a command which fails prints."""
    assert main(arguments) == code
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("whatwhere: ") and "\n" not in printed
    return printed


# --- recipes ------------------------------------------------------------------------------------


def test_recipes_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in recipes.names():
        for preset in recipes.presets(name):
            assert name in printed and preset in printed


@pytest.mark.parametrize(
    ("name", "preset"), [(name, one) for name in recipes.names() for one in recipes.presets(name)]
)
def test_a_recipe_is_printed_as_yaml_that_reads_back(
    name: str, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", name, "--preset", preset]) == 0
    assert recipes.from_yaml(capsys.readouterr().out) == recipes.get(name, preset)


# --- overrides ----------------------------------------------------------------------------------


def leaves(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else key)
    return found


def overridable() -> list[str]:
    content = recipes.get("text").model_dump()
    for key in ("name", "preset", "trained_by", "description", "encodings", "ours", "paper"):
        del content[key]
    del content["data"]["task"]
    return list(leaves(content))


OTHER = {str: ["x"], int: ["64"], float: ["0.25"], tuple: ["3", "4"]}
GIVEN = {
    "model.mlp": ["swiglu"],
    "training.precision": ["bf16"],
    "training.compile": ["default"],
    "training.parallel": ["fsdp"],
    "data.split": ["position"],
    "data.documents": ["pack"],
    "evaluation.yarn": ["finetune"],
    "evaluation.dataset": ["pg19"],
    "data.paths": ["3", "4"],
    "training.learning_rate": ["0.5"],
    "training.min_learning_rate": ["0.001"],
    "training.gradient_accumulation_steps": ["8"],
    "evaluation.finetune.batch_size": ["8"],
}


@pytest.mark.parametrize("field", overridable())
def test_every_field_is_an_option_of_the_right_type(field: str) -> None:
    before = leaves(recipes.get("text").model_dump())[field]
    option = "--" + field.replace("_", "-")
    if isinstance(before, bool):
        head, _, last = option.rpartition(".")
        arguments = [f"{head}.no-{last}" if before else option]
    else:
        kind = int if before is None else type(before)
        arguments = [option, *GIVEN.get(field, OTHER[kind])]
    command = parse(["compare", "text", *arguments])
    assert isinstance(command, Compare)
    after = leaves(command.settings.model_dump())
    changed = {key for key in after if after[key] != leaves(recipes.get("text").model_dump())[key]}
    assert changed == {field}
    if before is not None:
        assert type(after[field]) is type(before)


def test_none_and_a_number_are_both_understood() -> None:
    for given, expected in (("None", None), ("2", 2)):
        command = parse(["compare", "text", "--model.num-key-value-heads", given])
        assert isinstance(command, Compare)
        assert command.settings.model.num_key_value_heads == expected


def test_the_recipe_decides_options_and_defaults() -> None:
    command = parse(["compare", "indirect-indexing", "--preset", "paper", "--data.max-shift", "9"])
    assert isinstance(command, Compare)
    paper = recipes.get("indirect-indexing", "paper")
    assert command.settings.training == paper.training
    assert command.settings.data == paper.data.model_copy(update={"max_shift": 9})
    other = parse(["compare", "indirect-indexing", "--preset=paper"])
    assert isinstance(other, Compare) and other.settings == paper
    command = parse(
        ["train", "text", "--encoding", "pope", "--seed", "3", "--training.steps", "9"]
    )
    assert isinstance(command, Train)
    assert (command.encoding, command.seed, command.settings.training.steps) == ("pope", 3, 9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "text", "--training.stepz", "9"], "--training.steps"),
        (["compare", "text", "--training.steps", "many"], "--training.steps"),
        (["compare", "text", "--training.steps", "0"], "greater than or equal to 1"),
        (["compare", "text", "--training.precision", "fp8"], "bf16"),
        (["compare", "indirect-indexing", "--data.length", "9"], "--data.max-length"),
        (["train", "text"], "--encoding"),
        (["train", "text", "--encoding", "pope", "--seeds", "1"], "--seed"),
        (["extrapolate", "somewhere"], "--lengths"),
        (["compere"], "compare"),
        ([], "compare"),
    ],
)
def test_an_option_that_is_wrong_is_answered_with_what_is_right(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *commands.COMMANDS])
def test_help_says_what_a_command_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    known = commands.COMMANDS.get(command)
    first = (known.__doc__ or "").split(".")[0] if known else "Train decoders that differ"
    assert first.split("`")[0] in printed


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare"], "name a recipe first: one that"),
        (["compare", "--training.steps", "5", "text"], "name a recipe first"),
        (["compare", "txt"], "did you mean 'text'"),
        (["compare", "text", "--preset", "papr"], "expected one of quick, paper"),
        (["recipes", "txt"], "did you mean 'text'"),
        (["compare", "text", "--encodings", "rop"], "did you mean 'rope'"),
        (["train", "text", "--encoding", "rop"], "did you mean 'rope'"),
        (["train", "text", "--encoding", "pope", "--seed", "-1"], "seeds.0"),
        (["compare", "text", "--seeds", "-1"], "seeds.0"),
        (["compare", "text", "--seeds", "0", "0"], "seeds repeat: 0 0"),
        (["compare", "text", "--seeds"], "one seed"),
        (["compare", "text", "--evaluation.lengths", "64", "64"], "lengths repeat: 64 64"),
        (["compare", "indirect-indexing", "--text", "a"], "is not text"),
        (["compare", "jsb", "--text", "a"], "its data set 'jsb' takes --from"),
        (["compare", "indirect-indexing", "--from", "a"], "makes its own data"),
        (["compare", "text", "--text", "a", "--from", "b"], "give one of them"),
        (["compare", "jsb", "--from", "nowhere.json"], "nowhere.json"),
        (["results", "nowhere"], "no comparison"),
        (["results", "--tables", "nowhere.md"], "nowhere.md: No such file"),
        (["data", "prepare", "jsb", "--from", "nowhere.json", "--output", "x"], "nowhere.json"),
        (["plan", "txt"], "did you mean 'text'"),
        (["compare", "text", "--text", "nowhere"], "nowhere"),
        (["compare", "text", "--text", ""], "blank"),
        (["compare", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["evaluate", "nowhere"], "no run folder"),
        (["extrapolate", "nowhere", "--lengths", "8"], "no folder"),
        (["extrapolate", ".", "--lengths", "8,x"], "lengths: expected integers"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in failed(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"\x00\xff\xfe\x80 binary", "binary|UTF-8"), (b" \n", "blank|empty")],
)
def test_an_empty_or_binary_text_is_named(
    content: bytes, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    line = failed(["compare", "text", "--text", str(path)], capsys)
    assert "bad.txt" in line and any(word in line for word in said.split("|"))


def test_an_unknown_key_of_a_file_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    content = yaml.safe_load(recipes.to_yaml(recipes.get("text")))
    content["training"]["stepz"] = 4
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    line = failed(["compare", str(path)], capsys)
    assert "mine.yaml: unknown key 'training.stepz' (did you mean 'steps'?)" in line
    assert "has no --preset" in failed(["compare", str(path), "--preset", "quick"], capsys)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (DiskFullError("no space left on the disk of x"), 1, "no space left"),
    ],
)
def test_what_comes_from_outside_is_one_line_too(
    error: BaseException,
    code: int,
    said: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("whatwhere.lab.compare.train", fail)
    arguments = ["compare", "text", *SMALL, "--encodings", "rope", "--text", words]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == code
    assert f"whatwhere: {said}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    arguments = ["compare", "text", *SMALL, "--encodings", "rope", "--text", words]
    for place in (taken, taken / "below"):
        assert main([*arguments, "--output", str(place)]) == 1
        assert f"whatwhere: cannot write {place}: " in capsys.readouterr().err
    assert taken.read_text() == "mine"


def test_a_full_disk_that_another_thread_meets_is_left_to_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(error: Exception) -> None:
        def fail() -> None:
            raise error

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    def listed() -> tuple[str, ...]:
        run(OSError(errno.ENOSPC, "No space left on device"))
        run(ValueError("a bug"))
        return ()

    monkeypatch.setattr(recipes, "names", listed)
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().err
    assert "No space" not in printed and "ValueError: a bug" in printed


def test_a_full_disk_in_the_middle_leaves_what_was_there(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "text", *SMALL, "--text", words, "--output", str(out)]
    assert main([*arguments, "--encodings", "rope"]) == 0
    before = (out / "results.csv").read_bytes()
    real = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if "nope-seed0" in str(self) and "results.csv" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert main([*arguments, "--encodings", "nope"]) == 1
    assert "whatwhere: no space left" in capsys.readouterr().err
    assert (out / "results.csv").read_bytes() == before
    assert main([*arguments, "--encodings", "nope"]) == 0
    assert b"nope" in (out / "results.csv").read_bytes()


def test_a_fault_of_ours_keeps_its_traceback(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("whatwhere.lab.compare.train", fail)
    with pytest.raises(ValueError, match="a bug"):
        arguments = ["compare", "text", *SMALL, "--encodings", "rope", "--text", words]
        main([*arguments, "--output", str(tmp_path / "out")])


def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Imported anew below, which would leave the package with a module unknown to later tests.
    monkeypatch.setattr(whatwhere, "lab", whatwhere.lab)
    for name in [name for name in sys.modules if name.startswith("whatwhere.lab")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tyro", None)
    line = failed(["recipes"], capsys, code=1)
    assert "tyro" in line and "pip install 'whatwhere[lab]'" in line


def test_help_does_not_wait_for_transformers() -> None:
    program = (
        "import sys\n"
        "from whatwhere.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "found = {'transformers', 'accelerate', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the whole way ------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_a_recipe_to_a_report_and_back(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "text", *SMALL, "--text", words, "--output", str(out)]
    assert main([*arguments, "--encodings", "rope", "yarn", "--seeds", "0", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"report: {out / 'report.html'}" in printed and (out / "report.html").exists()
    train = ["train", "text", *SMALL, "--text", words, "--output", str(out)]
    assert main([*train, "--encoding", "pope", "--seed", "1"]) == 0
    assert (out / "pope-seed1" / "model").exists() and not (out / "pope-seed0").exists()
    run = str(out / "pope-seed1")
    assert main(["evaluate", run]) == 0
    assert main(["extrapolate", run, "--lengths", "32,64", "--tokens", "128"]) == 0
    assert (out / "pope-seed1" / "extrapolate" / "loss_by_length.csv").exists()
    assert main(["report", str(out)]) == 0
    capsys.readouterr()
    line = failed([*arguments, "--encodings", "rope", "--training.grad-clip", "2"], capsys)
    assert "training.grad_clip: 1.0 -> 2.0" in line
