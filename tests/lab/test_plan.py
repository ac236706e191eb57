"""`whatwhere plan`: formulas against what PyTorch allocates and counts, and against the paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch.utils.flop_counter import FlopCounterMode

import whatwhere as ww
from whatwhere.attention import choices
from whatwhere.lab import recipes
from whatwhere.lab.data import IndirectIndexingData, IndirectIndexingTask, TextData
from whatwhere.lab.data.catalogue import CORPORA
from whatwhere.lab.plan.assumptions import assumptions
from whatwhere.lab.plan.backend import backend_of
from whatwhere.lab.plan.devices import DEVICES
from whatwhere.lab.plan.fitting import Layout
from whatwhere.lab.plan.flops import forward_flops, seen_pairs
from whatwhere.lab.plan.measure import TrainingStep
from whatwhere.lab.plan.memory import Step, kept, state_bytes
from whatwhere.lab.plan.planning import GB, Machine, RecipePlan, plan
from whatwhere.lab.plan.shape import Shape, Sizes, shape_of
from whatwhere.lab.plan.vocabulary import DATASETS, TOKENIZERS, length_of, vocabulary_of
from whatwhere.lab.recipes import EncodingChoice, ModelSettings, Recipe

# The formulas count every tensor that is larger than a row of the batch. What they leave out
# (counts, random states, masks of the reference) is fixed, and is 1 % of models of this size and
# less of larger ones; kernels that lay a result out otherwise in another PyTorch would add one
# tensor of a layer, about 4 %.
TOLERANCE = 0.05

SIZES = Sizes(vocab_size=50, length=96)
SMALL = ModelSettings(hidden_size=48, num_hidden_layers=2, num_attention_heads=4)

ENCODINGS = {
    "rope": EncodingChoice(name="rope"),
    "partial-rope": EncodingChoice(name="rope", options={"fraction": 0.34}),
    "rope-id": EncodingChoice(name="rope-id"),
    "pope": EncodingChoice(name="pope"),
    "partial-pope": EncodingChoice(name="pope", options={"fraction": 0.25}),
    "pope-raw": EncodingChoice(name="pope", options={"fraction": 0.5, "rest": "raw"}),
    "pope-without-delta": EncodingChoice(name="pope", options={"delta": None}),
    "pope-relu": EncodingChoice(name="pope", options={"magnitude": "relu"}),
    "pope-signed": EncodingChoice(name="pope", options={"magnitude": "none"}),
    "pope-id": EncodingChoice(name="pope-id"),
    "nope": EncodingChoice(name="nope"),
    "learned": EncodingChoice(name="learned"),
    "sinusoidal": EncodingChoice(name="sinusoidal"),
    "alibi": EncodingChoice(name="alibi"),
}

SHAPES: dict[str, dict[str, Any]] = {
    "qk-norm": {"qk_norm": True},
    "dropout": {"dropout": 0.1},
    "grouped": {"num_key_value_heads": 2},
    "swiglu-untied": {"mlp": "swiglu", "tie_word_embeddings": False},
    "wide-heads": {"head_dim": 20},
    "everything": {
        "qk_norm": True,
        "dropout": 0.1,
        "num_key_value_heads": 1,
        "mlp": "swiglu",
        "tie_word_embeddings": False,
        "num_hidden_layers": 3,
    },
}


@pytest.fixture(autouse=True)
def _no_choices_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choices.VARIABLE, str(tmp_path / "none.json"))
    choices.forget()


def step_of(
    backend: str, width: int = 4, checkpointing: bool = False, length: int = SIZES.length
) -> Step:
    return Step(length, length, "cpu", width, backend, checkpointing)


def check(
    model: ModelSettings,
    choice: EncodingChoice,
    step: Step,
    sizes: Sizes = SIZES,
    sequences: int = 3,
) -> None:
    """State exactly, kept within the tolerance."""
    shape = shape_of(model, choice, sizes)
    found = TrainingStep(model, choice, sizes, step, sequences).measure()
    assert sum(state_bytes(shape).values()) == found.state
    predicted = kept(shape, step).total(sequences)
    assert predicted == pytest.approx(found.kept, rel=TOLERANCE)


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
@pytest.mark.parametrize("label", ENCODINGS)
def test_memory_of_each_encoding(label: str, backend: str) -> None:
    check(SMALL, ENCODINGS[label], step_of(backend))


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
@pytest.mark.parametrize("label", ["rope", "pope", "nope"])
def test_memory_under_autocast(label: str, backend: str) -> None:
    check(SMALL, ENCODINGS[label], step_of(backend, width=2))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("width", [4, 2])
@pytest.mark.parametrize("label", ["rope", "pope"])
@pytest.mark.parametrize("change", SHAPES)
def test_memory_of_each_shape(change: str, label: str, width: int) -> None:
    model = SMALL.model_copy(update=SHAPES[change])
    check(model, ENCODINGS[label], step_of("sdpa" if width == 4 else "cpu", width))


@pytest.mark.parametrize("width", [4, 2])
@pytest.mark.parametrize("label", ["pope", "nope"])
def test_memory_with_checkpointing(label: str, width: int) -> None:
    check(SMALL, ENCODINGS[label], step_of("cpu", width, checkpointing=True))


def test_memory_of_the_reference() -> None:
    check(SMALL, ENCODINGS["pope"], step_of("reference"))


def test_memory_of_the_kernels() -> None:
    """In Triton's interpreter. Under the hooks that count, `widened` keeps features instead."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU the kernels are compiled and take no CPU tensors")
    model = SMALL.model_copy(update={"num_hidden_layers": 1, "hidden_size": 64})
    sizes = Sizes(vocab_size=50, length=32)
    check(model, ENCODINGS["pope"], step_of("triton", length=32), sizes, sequences=1)


@pytest.mark.parametrize(("name", "labels"), [("text", 2), ("indirect-indexing", 2)])
def test_memory_of_the_quick_presets(name: str, labels: int) -> None:
    """Their shapes and the backend that they take, with fewer sequences."""
    recipe = recipes.get(name)
    sizes = Sizes(vocabulary_of(recipe.data), length_of(recipe.data))
    for label in [n for n in recipe.encodings if n != "yarn"][-labels:]:
        choice = recipe.encodings[label]
        shape = shape_of(recipe.model, choice, sizes)
        backend = backend_of(shape, sizes.length, "cpu", "")
        check(recipe.model, choice, step_of(backend, length=sizes.length), sizes, sequences=4)


def test_sequences_and_fixed_parts_are_told_apart() -> None:
    shape, step = shape_of(SMALL, ENCODINGS["pope"], SIZES), step_of("sdpa")
    one, three = (
        TrainingStep(SMALL, ENCODINGS["pope"], SIZES, step, n).measure().kept for n in (1, 3)
    )
    found = kept(shape, step)
    assert sum(found.sequence.values()) == pytest.approx((three - one) / 2, rel=TOLERANCE)
    assert sum(found.fixed.values()) == pytest.approx((3 * one - three) / 2, rel=TOLERANCE)


def counted(choice: EncodingChoice, model: ModelSettings = SMALL) -> int:
    """FLOPs of a step as PyTorch counts them: products of the reference, hidden keys included."""
    step = TrainingStep(model, choice, SIZES, step_of("reference"), sequences=2)
    with FlopCounterMode(display=False) as counter:
        step.loss().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("label", ["rope", "pope", "partial-pope", "nope"])
@pytest.mark.parametrize("change", [None, "grouped", "swiglu-untied", "wide-heads"])
def test_flops_are_those_that_pytorch_counts(label: str, change: str | None) -> None:
    """Within 0.5 %: it counts the products of positions and frequencies too."""
    model = SMALL.model_copy(update=SHAPES[change] if change else {})
    shape = shape_of(model, ENCODINGS[label], SIZES)
    predicted = 2 * forward_flops(shape, SIZES.length, causal=False).training
    assert predicted == pytest.approx(counted(ENCODINGS[label], model), rel=0.005)


def test_causal_attention_is_half_and_a_window_less() -> None:
    for length, window in ((1, None), (7, None), (7, 1), (7, 3), (7, 7), (7, 9)):
        reach = window or length
        seen = sum(min(t + 1, reach) for t in range(length))
        assert seen_pairs(length, window) == seen
    assert seen_pairs(1000) / seen_pairs(1000, causal=False) == pytest.approx(0.5, rel=2e-3)


def shape_of_774m(encoding: str) -> Shape:
    model = ModelSettings(hidden_size=1280, num_hidden_layers=36, num_attention_heads=20)
    return shape_of(model, EncodingChoice(name=encoding), Sizes(50257, 1024))


@pytest.mark.parametrize(("length", "percent"), [(1024, 5.9), (2048, 10.5), (4096, 17.4)])
def test_what_pope_costs_is_what_its_paper_says(length: int, percent: float) -> None:
    """arXiv 2509.10534: a layer costs L / (12 d_model + 2 L) more; hidden keys are counted."""
    rope, pope = (
        forward_flops(shape_of_774m(name), length, causal=False).layers
        for name in ("rope", "pope")
    )
    assert pope / rope - 1 == pytest.approx(length / (12 * 1280 + 2 * length), rel=1e-12)
    assert round(100 * (pope / rope - 1), 1) == percent


def test_parameters_are_those_of_the_model() -> None:
    shape = shape_of_774m("pope")
    delta = 36 * 20 * 64
    assert shape.encoding_parameters == delta
    assert shape.parameters == shape_of_774m("rope").parameters + delta
    learned = shape_of(SMALL, ENCODINGS["learned"], SIZES)
    assert learned.encoding_parameters == SIZES.length * SMALL.hidden_size
    encoding = ww.make("pope", head_dim=64, num_heads=20)
    assert shape.table_bytes(512) == ww.table_bytes(encoding, 512) == 2 * 4 * 512 * 64


# Plans.


def large(**changes: Any) -> Recipe:
    """774M parameters, 64 sequences of 1024 a step, three seeds."""
    content: dict[str, Any] = {
        "name": "large",
        "data": {"task": "text", "tokenizer": "gpt2", "length": 1024},
        "model": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
        "training": {"steps": 1000, "batch_size": 64},
        "encodings": {"rope": {"name": "rope"}, "pope": {"name": "pope"}},
        "seeds": [0, 1, 2],
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if key in ("training", "data") else value
    return Recipe.model_validate(content)


def test_the_largest_micro_batch_that_fits_and_divides() -> None:
    made = plan(large(), Machine(gpus=8, memory=40))
    for run in made.runs:
        fit = run.fit
        assert fit.fits and fit.total <= 40 * GB
        assert fit.micro_batch * fit.accumulation * 8 == 64
        larger = plan(large(training={"batch_size": 128 * fit.micro_batch}), Machine(memory=40))
        assert larger.runs[0].fit.micro_batch < 16 * fit.micro_batch
    most = plan(large(), Machine(gpus=8, memory=1000)).runs[0].fit
    assert (most.micro_batch, most.accumulation) == (8, 1)
    # One sequence more than the largest does not fit.
    one = plan(large(training={"batch_size": 1}), Machine(memory=1000)).runs[0].fit
    tight = plan(large(training={"batch_size": 1}), Machine(memory=one.total / GB)).runs[0]
    short = plan(large(training={"batch_size": 1}), Machine(memory=one.total / GB - 0.001)).runs[0]
    assert tight.fit.fits and not short.fit.fits


def test_fsdp_divides_the_state_and_checkpointing_what_is_kept() -> None:
    machine = Machine(gpus=8)
    whole = plan(large(), machine).runs[1]
    sharded = plan(large(training={"parallel": "fsdp"}), machine).runs[1]
    for part in ("weights", "gradients", "optimizer"):
        assert whole.fit.bytes[part] == whole.state[part]
        assert sharded.fit.bytes[part] == pytest.approx(whole.state[part] / 8, abs=8)
    assert whole.fit.bytes["buckets"] == whole.state["gradients"]
    assert "buckets" not in sharded.fit.bytes and sharded.fit.bytes["gathered"] > 0
    assert sum(whole.kept_checkpointed.sequence.values()) < sum(whole.kept.sequence.values()) / 2
    again = plan(large(training={"activation_checkpointing": True}), machine).runs[1]
    assert again.fit == whole.other and again.step_flops == whole.step_flops
    assert again.seconds is not None and whole.seconds is not None
    again_flops = whole.flops.layers / whole.flops.training
    assert again.seconds / whole.seconds == pytest.approx(1 + again_flops)


def test_time_is_flops_over_an_assumed_rate() -> None:
    machine = Machine(gpus=4, flops=100, mfu=0.5, floor=0)
    made = plan(large(), machine)
    run = made.runs[0]
    assert run.seconds == pytest.approx(run.total_flops / (4 * 100e12 * 0.5))
    assert run.tokens == 1000 * 64 * 1024 and made.count == 6
    assert run.tokens_per_second == pytest.approx(run.tokens / run.seconds)
    assert made.seconds == pytest.approx(3 * sum(run.seconds or 0 for run in made.runs))
    assert made.gpu_hours == pytest.approx(4 * (made.seconds or 0) / 3600)
    slow = plan(large(), replace(machine, floor=100)).runs[0]
    assert slow.floored and slow.seconds == 1000 * 100 * slow.fit.accumulation
    weights = 3 * sum(4 * run.parameters for run in made.runs)
    assert made.disk_bytes == weights + 2 * max(run.checkpoint_bytes for run in made.runs)


def test_what_does_not_fit_says_what_would() -> None:
    alone = plan(large(), Machine(memory=11)).runs[0]
    assert not alone.fit.fits and alone.seconds is None and alone.advice is not None
    assert "--gpus 4 --parallel fsdp --training.activation-checkpointing (" in alone.advice
    advised = large(training={"parallel": "fsdp", "activation_checkpointing": True})
    assert not plan(advised, Machine(gpus=2, memory=11)).runs[0].fit.fits
    assert plan(advised, Machine(gpus=4, memory=11)).runs[0].fit.fits
    longer = large(training={"batch_size": 1}, data={"length": 16384})
    whole = plan(longer, Machine(memory=1000)).runs[0].fit.total
    tall = plan(longer, Machine(memory=0.9 * whole / GB)).runs[0]
    assert tall.advice is not None and "--training.activation-checkpointing (" in tall.advice
    hopeless = plan(longer, Machine(memory=3)).runs[0]
    assert hopeless.advice is not None and "nothing that was tried" in hopeless.advice
    assert plan(longer, Machine(memory=3)).gpu_hours is None


def test_a_batch_that_does_not_divide_leaves_gpus_idle() -> None:
    made = plan(large(training={"batch_size": 4}), Machine(gpus=8))
    assert made.runs[0].fit.gpus == 4
    assert any("4 of 8 GPUs" in line for line in assumptions(made))
    assert Layout(6, "ddp").replicas(64) == 4
    assert Layout(8, "ddp", context_parallel=2).used(64) == 8


def test_shared_sequences_keep_less_each() -> None:
    shared = large(training={"context_parallel": 2})
    whole, half = (plan(r, Machine(gpus=8)).runs[1] for r in (large(), shared))
    ratio = sum(half.kept.sequence.values()) / sum(whole.kept.sequence.values())
    assert 0.5 < ratio < 0.75  # all keys, half of all else
    assert half.fit.bytes["keys of the others"] > 0
    with pytest.raises(ValueError, match="do not divide into 4 chunks"):
        plan(large(training={"context_parallel": 2}, data={"length": 1022}), Machine(gpus=2))


def test_what_is_not_trained_costs_nothing() -> None:
    encodings = {"rope": {"name": "rope"}, "yarn": {"name": "yarn"}}
    made = plan(large(encodings=encodings), Machine())
    assert made.count == 3 and made.runs[1].not_trained == "evaluated from the rope run"
    tuned = plan(large(encodings=encodings, evaluation={"yarn": "finetune"}), Machine())
    run = tuned.runs[1]
    assert tuned.count == 6 and (run.length, run.steps) == (4096, 500)
    encodings["pope"] = {"name": "pope", "finetune_from": "rope"}
    assert plan(large(encodings=encodings), Machine()).runs[2].length == 4096
    others = plan(large(trained_by="other"), Machine())
    assert others.count == 0 and others.gpu_hours == 0
    assert others.runs[0].not_trained == "trained by recipe other"


def test_the_backend_is_what_auto_takes() -> None:
    title = DEVICES["h100"].title
    small_model = ModelSettings(hidden_size=128, num_hidden_layers=1, num_attention_heads=2)
    for label, expected in (("rope", "sdpa"), ("pope", "sdpa"), ("alibi", "flex")):
        shape = shape_of(small_model, ENCODINGS[label], Sizes(50, 256))
        assert backend_of(shape, 256, "cuda", title) == expected
    shape = shape_of(small_model, ENCODINGS["pope"], Sizes(50, 256))
    assert backend_of(shape, 256, "cpu", "") == "cpu"
    assert backend_of(replace(shape, attention_backend="flex"), 256, "cuda", title) == "flex"
    assert backend_of(replace(shape, packed=True), 256, "cuda", title) == "flex"
    entry = {
        "device": "NVIDIA H100",
        "head_dim": 64,
        "feature_dim": 128,
        "value_dim": 64,
        "min_length": 1,
        "max_length": None,
        "stage": "forward+backward",
        "backend": "triton",
        "measured": True,
        "source": "a test",
    }
    choices.save([entry])
    assert backend_of(shape, 256, "cuda", title) == "triton"
    with pytest.raises(ValueError, match="attention_backend"):
        backend_of(replace(shape, attention_backend="none"), 256, "cuda", title)


class Tokens(BaseModel):
    """Settings as those of tokens in shards are."""

    task: str = "tokens"
    dataset: str = "text"
    paths: tuple[str, ...] = ()
    tokenizer: str | None = None
    length: int = 1024


def test_vocabularies(tmp_path: Path) -> None:
    assert vocabulary_of(TextData()) == 256 and length_of(TextData(length=64)) == 64
    task = IndirectIndexingTask(IndirectIndexingData())
    assert vocabulary_of(task.data) == task.vocab_size == 66
    assert length_of(task.data) == task.length == 48
    expected = {"jsb": 90, "maestro": 328, "midi": 328, "genome": 4107, "fasta": 4107}
    expected |= {"openwebtext": 50257, "pg19": 50257, "dolma": 128256}
    expected |= {"fineweb": 128256, "fineweb-edu": 128256, "text": 256}
    assert {n: vocabulary_of(Tokens(dataset=n)) for n in DATASETS} == expected
    assert expected.keys() == CORPORA.keys()
    assert vocabulary_of(Tokens(dataset="genome", tokenizer="gpt2")) == TOKENIZERS["gpt2"]
    for data in (Tokens(dataset="nothing"), TextData(tokenizer="some/name")):
        with pytest.raises(ValueError, match="--vocab-size"):
            vocabulary_of(data)
    prepared = Tokens(dataset="nothing", paths=(str(tmp_path),))
    (tmp_path / "manifest.json").write_text('{"tokenizer": {"vocab_size": 777}}')
    assert vocabulary_of(prepared) == 777
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json"):
        vocabulary_of(prepared)


# The command.


def test_a_plan_leaves_random_numbers_of_torch_as_they_were() -> None:
    before = torch.get_rng_state()
    made = plan(recipes.get("text"), Machine())
    assert isinstance(made, RecipePlan)
    assert torch.equal(before, torch.get_rng_state())
