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
    length = data.max_length + 8 if data.task == "indirect-indexing" else data.length
    for choice in [*shipped.encodings.values(), *shipped.ours.values()]:
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


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("text", "124m"),
        *(("indirect-indexing",) * 2, ("jsb",) * 2, ("maestro",) * 2, ("genome",) * 2),
        *((f"openwebtext-{size}", size) for size in ("124m", "253m", "774m")),
        *(("ablation-124m", "124m"), ("zero-shot-253m", "253m"), ("pg19-774m", "774m")),
        *(("rope-id-1b", "llama-1b"), ("rope-id-3b", "llama-3b")),
        ("partial-rope-llama-1b-2048", "llama-1b"),
        ("partial-rope-llama-8b-edu-8192", "llama-8b"),
        ("partial-rope-pythia-1b-1024", "pythia-1b"),
    ],
)
def test_paper_presets_have_the_papers_shape(name: str, shape: str) -> None:
    config = preset(shape, vocab_size=300, position_encoding="pope")
    for field, value in recipes.get(name, "paper").model.model_dump().items():
        if value is not None:
            assert getattr(config, field) == value, field


# The PoPE paper's table of hyperparameters: length, batch, rates, decay, beta2, steps, warm-up,
# dropout, start of delta.
COLUMNS_OF_THE_PAPER = {
    "openwebtext-124m": (1024, 64, 6e-4, 6e-5, 0.01, 0.95, 100_000, 1000, 0.0, "zero"),
    "openwebtext-253m": (1024, 64, 6e-4, 6e-5, 0.01, 0.95, 100_000, 1000, 0.0, "zero"),
    "openwebtext-774m": (1024, 64, 6e-4, 6e-5, 0.01, 0.95, 100_000, 1000, 0.0, "zero"),
    "jsb": (2048, 4, 6e-4, 6e-5, 0.01, 0.99, 3000, 10, 0.2, "uniform"),
    "maestro": (2048, 16, 6e-4, 6e-5, 0.01, 0.99, 60_000, 500, 0.1, "uniform"),
    "genome": (1000, 64, 2.5e-4, 2.5e-5, 0.01, 0.999, 100_000, 4000, 0.1, "uniform"),
}


@pytest.mark.parametrize("name", COLUMNS_OF_THE_PAPER)
def test_a_recipe_has_the_papers_column(name: str) -> None:
    made = recipes.get(name, "paper")
    training, data = made.training, made.data
    assert data.task == "tokens"
    found = (
        *(data.length, training.batch_size, training.learning_rate, training.min_learning_rate),
        *(training.weight_decay, training.beta2, training.steps, training.warmup_steps),
        *(made.model.dropout, made.encodings["pope"].options.get("delta", "zero")),
    )
    assert found == COLUMNS_OF_THE_PAPER[name]
    assert training.grad_clip == 1.0 and set(made.encodings) == {"rope", "pope"}


def test_every_figure_of_the_papers_is_in_a_recipe() -> None:
    def figure(name: str, label: str, metric: str) -> float:
        return recipes.get(name, "paper").paper[label][metric].value

    test_losses = {"jsb": (0.5081, 0.4889), "maestro": (1.501, 1.486), "genome": (4.217, 4.152)}
    for name, (rope, pope) in test_losses.items():
        assert (figure(name, "rope", "test_loss"), figure(name, "pope", "test_loss")) == (
            rope,
            pope,
        )
    perplexities = {"124m": (21.55, 21.33), "253m": (18.88, 18.55), "774m": (15.85, 15.45)}
    means = {"124m": (0.4533, 0.4619), "253m": (0.4876, 0.4878), "774m": (0.5180, 0.5246)}
    for size in perplexities:
        for place, label in enumerate(("rope", "pope")):
            found = figure(f"openwebtext-{size}", label, "perplexity")
            assert found == perplexities[size][place]
            found = figure(f"zero-shot-{size}", label, "zero_shot_accuracy")
            assert found == pytest.approx(means[size][place])
    ablations = {"124m": (21.57, 21.55, 21.42, 21.33), "253m": (18.93, 18.90, 18.57, 18.55)}
    for size, values in ablations.items():
        labels = ("no-softplus", "relu", "no-delta", "pope")
        found_all = [figure(f"ablation-{size}", label, "perplexity") for label in labels]
        assert found_all == list(values)
    order = ("rope", "rope-high", "rope-half", "yarn", "rope-id")
    ruler = {
        ("1b", 4096): (39.72, 16.04, 43.07, 40.24, 39.15),
        ("1b", 8192): (0.01, 7.60, 0.14, 35.55, 35.64),
        ("1b", 16384): (0.03, 2.37, 0, 30.25, 30.83),
        ("3b", 8192): (0.14, 14.31, 0.4, 45.09, 43.39),
        ("3b", 16384): (0.01, 5.14, 0.03, 40.14, 42.00),
    }
    for (size, length), row in ruler.items():
        found_all = [figure(f"rope-id-{size}", e, f"ruler_accuracy@{length}") for e in order]
        assert [100 * value for value in found_all] == pytest.approx(list(row))
    longbench = {
        "1b": (8.73, 11.04, 8.86, 14.09, 15.80),
        "3b": (10.42, 13.78, 10.62, 19.63, 17.94),
    }
    for size, row in longbench.items():
        found_all = [figure(f"rope-id-{size}", e, "longbench_score@16384") for e in order]
        assert [100 * value for value in found_all] == pytest.approx(list(row))
    piqa = {"rope": 72.58, "partial-rope-10": 73.12, "partial-rope-4": 71.06, "nope": 70.67}
    for label, value in piqa.items():
        found = figure("partial-rope-llama-1b-2048", label, "piqa_acc_norm")
        assert 100 * found == pytest.approx(value)


@pytest.mark.parametrize(("name", "made"), SHIPPED)
def test_the_papers_figures_belong_to_encodings_of_the_recipe(name: str, made: str) -> None:
    shipped = recipes.get(name, made)
    assert shipped.paper.keys() <= shipped.encodings.keys()
    assert not shipped.ours.keys() & shipped.encodings.keys()
    assert shipped.preset == made and shipped.name == name
    if shipped.trained_by is not None:
        trainer = recipes.get(shipped.trained_by, made)
        assert (trainer.data, trainer.model, trainer.training) == (
            *(shipped.data, shipped.model, shipped.training),
        )


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
    with pytest.raises(ValueError, match=r"did you mean 'text'.*whatwhere recipes"):
        recipes.get("txt")
    with pytest.raises(ValueError, match="no preset 'papers': expected one of quick, paper"):
        recipes.get("text", "papers")


def test_settings_cannot_be_changed_in_place() -> None:
    made = recipes.get("text")
    with pytest.raises(ValueError, match="frozen"):
        made.name = "other"
    assert isinstance(made, Recipe)
