from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import recipe

import whatwhere as ww
from whatwhere.lab import recipes
from whatwhere.lab.recipes import Recipe
from whatwhere.models import preset

SHIPPED = [(name, made) for name in recipes.names() for made in recipes.presets(name)]


@pytest.mark.parametrize(("name", "made"), SHIPPED)
def test_a_recipe_survives_yaml(name: str, made: str, tmp_path: Path) -> None:
    shipped = recipes.get(name, made)
    written = recipes.to_yaml(shipped)
    assert recipes.from_yaml(written) == shipped
    path = tmp_path / "recipe.yaml"
    path.write_text(written)
    assert recipes.from_yaml(path) == shipped


@pytest.mark.parametrize("path", ["0\x85", "a\u2028b", "a\u2029b", "Überall.txt"])
def test_names_of_files_that_hold_line_breaks(path: str) -> None:
    made = recipe("a.txt", data={"paths": [path]})
    assert recipes.from_yaml(recipes.to_yaml(made)) == made


@settings(max_examples=30)
@given(
    rate=st.floats(1e-9, 1.0),
    steps=st.integers(1, 10**9),
    paths=st.lists(st.text(min_size=1).filter(str.strip), max_size=3),
    options=st.dictionaries(
        st.sampled_from(["base", "fraction", "delta"]),
        st.one_of(st.floats(allow_nan=False), st.booleans(), st.integers(), st.none()),
    ),
)
def test_so_does_any_other(
    rate: float, steps: int, paths: list[str], options: dict[str, Any]
) -> None:
    made = recipe(
        "a.txt",
        data={"paths": paths},
        training={"steps": steps, "learning_rate": rate, "min_learning_rate": 0.0},
        encodings={"x": {"name": "pope", "options": options}},
    )
    assert recipes.from_yaml(recipes.to_yaml(made)) == made


@pytest.mark.parametrize(("name", "made"), SHIPPED)
def test_every_shipped_encoding_can_be_made(name: str, made: str) -> None:
    shipped = recipes.get(name, made)
    shape, data = shipped.model, shipped.data
    length = data.length if data.task == "text" else data.max_length + 8
    for choice in shipped.encodings.values():
        options = choice.options | ({"factor": 2.0} if choice.name == "yarn" else {})
        width = shape.hidden_size // shape.num_attention_heads
        ww.make(
            choice.name,
            head_dim=width,
            num_heads=shape.num_attention_heads,
            train_length=length,
            **options,
        )


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_a_text_recipes_description_holds_whatever_the_text(preset: str) -> None:
    # It stands in the report, where options may have named another text and other lengths.
    description = recipes.get("text", preset).description
    assert "standard library" not in description and "--text" not in description


@pytest.mark.parametrize(("name", "shape"), [("text", "124m"), ("indirect-indexing",) * 2])
def test_paper_presets_have_the_papers_shape(name: str, shape: str) -> None:
    config = preset(shape, vocab_size=300, position_encoding="pope")
    for field, value in recipes.get(name, "paper").model.model_dump().items():
        if value is not None:
            assert getattr(config, field) == value, field


def test_indirect_indexing_is_the_papers_column() -> None:
    made = recipes.get("indirect-indexing", "paper")
    training = made.training
    assert (training.steps, training.batch_size, training.warmup_steps) == (100_000, 64, 4000)
    assert (training.learning_rate, training.min_learning_rate) == (2e-4, 2e-5)
    assert (training.weight_decay, training.grad_clip, training.beta2) == (0.01, 1.0, 0.99)
    assert made.model.dropout == 0 and made.seeds == (0, 1, 2)
    assert made.encodings["pope"].options == {"delta": "uniform"}
    assert made.encodings["rope-half"].options == {"fraction": 0.5}
    assert made.encodings["alibi-half"].options == {"fraction": 0.5}
    figures = {label: made.paper[label]["accuracy"].value for label in made.encodings}
    assert figures == {
        "rope": 0.1116,
        "pope": 0.9482,
        "rope-half": 0.2850,
        "alibi-half": 0.2735,
        "learned": 0.1008,
        "sinusoidal": 0.0190,
    }


def edited(*path: str | int, value: Any) -> str:
    content = yaml.safe_load(recipes.to_yaml(recipes.get("indirect-indexing", "paper")))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        (("trainin",), "did you mean 'training'"),
        (("training", "stepz"), "did you mean 'steps'"),
        (("data", "max_lenght"), "did you mean 'max_length'"),
        (("model", "heads"), "num_attention_heads"),
        (("evaluation", "finetune", "factr"), "did you mean 'factor'"),
        (("encodings", "rope", "option"), "did you mean 'options'"),
        (("paper", "rope", "accuracy", "spred"), "did you mean 'spread'"),
    ],
)
def test_an_unknown_key_is_named_with_near_and_valid_ones(
    path: tuple[str, ...], hint: str
) -> None:
    with pytest.raises(ValueError, match="unknown key") as caught:
        recipes.from_yaml(edited(*path, value=1))
    message = str(caught.value)
    assert repr(".".join(path)) in message and hint in message and "\n" not in message


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("training", "steps"), "many", "training.steps: .*integer.*'many'"),
        (("training", "steps"), 0, "training.steps: .*greater than or equal to 1.*0"),
        (("training", "min_learning_rate"), 1.0, "training: min_learning_rate=1.0 exceeds"),
        (("training", "gradient_accumulation_steps"), 3, "training: batch_size=64 is no multiple"),
        (("training", "precision"), "fp8", "training.precision: .*'fp8'"),
        (("data", "max_length"), 60, "data: min_length <= max_length"),
        (("data", "task"), "music", "data: .*'music'"),
        (("seeds",), [1, 1], "seeds repeat: 1 1"),
        (("seeds",), [-1], "seeds.0: .*-1"),
        (("encodings",), {}, "at least one encoding"),
        (("encodings", "a/b"), {"name": "rope"}, "encodings.a/b: .*pattern"),
        (("evaluation", "lengths"), [64], "evaluation.lengths"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_key(
    path: tuple[str, ...], value: Any, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        recipes.from_yaml(edited(*path, value=value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "just words", "!!python/object:os.system {}"])
def test_what_is_no_recipe_is_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        recipes.from_yaml(text)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match=r"mine\.yaml: not UTF-8 text"):
        recipes.from_yaml(path)


def test_a_number_with_an_exponent_is_a_number_in_options_too() -> None:
    # YAML 1.1 takes 5e5 for a string.
    made = recipes.from_yaml(
        "{name: x, data: {task: text}, training: {learning_rate: 1e-3, min_learning_rate: 1e-4},"
        " encodings: {rope: {name: rope, options: {base: 5e5}}}}"
    )
    assert made.encodings["rope"].options == {"base": 500000.0}
    assert made.training.learning_rate == 1e-3


def test_unknown_names_are_answered_with_the_known() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'text'.*indirect-indexing"):
        recipes.get("txt")
    with pytest.raises(ValueError, match="no preset 'papers': expected one of quick, paper"):
        recipes.get("text", "papers")


def test_settings_cannot_be_changed_in_place() -> None:
    made = recipes.get("text")
    with pytest.raises(ValueError, match="frozen"):
        made.name = "other"
    assert isinstance(made, Recipe)
