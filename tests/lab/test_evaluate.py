from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import recipe
from torch import Tensor, nn

import whatwhere as ww
from whatwhere.analysis.layers import table_length
from whatwhere.lab import evaluate
from whatwhere.lab.data import Batch
from whatwhere.lab.evaluate import length_loss, mean_loss, rows_for
from whatwhere.lab.recipes import EncodingChoice
from whatwhere.lab.train import build_model

SHAPE = recipe("unused").model
NAMES = [name for name in ww.ENCODINGS if name not in ("yarn",)]


def model(name: str, **options: Any) -> Any:
    task: Any = SimpleNamespace(vocab_size=50, length=96)
    made = build_model(SHAPE, task, EncodingChoice(name=name, options=options), seed=0)
    for parameter in made.parameters():  # away from the near-uniform start
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


def windows(count: int, length: int) -> Tensor:
    return torch.randint(50, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_windows_is_the_models_own(name: str) -> None:
    made, given = model(name), windows(5, 40)
    found = length_loss(made, given)
    with torch.no_grad():
        own = [made(row[None], labels=row[None]).loss.item() for row in given]
    assert found.loss == pytest.approx(sum(own) / 5, rel=1e-5)
    assert found.by_position.shape == (39,)
    assert found.by_position.mean().item() == pytest.approx(found.loss, rel=1e-9)
    assert (found.length, found.windows) == (40, 5)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_at_a_position_is_that_of_a_shorter_window(name: str) -> None:
    # Nothing after a position may count in it: windows of 20 are the first half of those of 40.
    made, given = model(name), windows(4, 40)
    long, short = length_loss(made, given), length_loss(made, given[:, :20])
    torch.testing.assert_close(long.by_position[:19], short.by_position, rtol=1e-4, atol=1e-5)


def test_the_first_position_has_one_token_before_it() -> None:
    made, given = model("rope"), windows(6, 10)
    with torch.no_grad():
        log = made(given[:, :1]).logits[:, -1].log_softmax(-1)
    expected = -log.gather(1, given[:, 1:2]).mean().item()
    assert length_loss(made, given).by_position[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "logits"), [(40, 10**9), (10**9, 4000), (10**9, 1), (80, 10**9)]
)
def test_how_windows_are_batched_does_not_matter(
    tokens: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, given = model("pope"), windows(7, 40)
    whole = length_loss(made, given)
    monkeypatch.setattr(evaluate, "MAX_TOKENS", tokens)
    monkeypatch.setattr(evaluate, "MAX_LOGITS", logits)
    parts = length_loss(made, given)
    torch.testing.assert_close(parts.by_position, whole.by_position, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "vocab"), [(2, 2), (128, 256), (1024, 50257), (10**6, 10**6)])
def test_a_batch_stays_within_bounds_unless_one_row_exceeds_them(length: int, vocab: int) -> None:
    rows = rows_for(length, vocab)
    assert rows >= 1
    if rows > 1:
        assert rows * length <= evaluate.MAX_TOKENS
        assert rows * length * vocab <= evaluate.MAX_LOGITS


def labelled(count: int, length: int) -> Batch:
    ids = windows(count, length)
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.6] = -100
    return Batch(ids, labels)


def test_loss_is_weighted_by_targets_not_by_batches() -> None:
    made, whole = model("rope"), labelled(6, 24)
    expected = made(whole.input_ids, labels=whole.labels).loss.item()
    parts = [Batch(whole.input_ids[i:j], whole.labels[i:j]) for i, j in ((0, 1), (1, 3), (3, 6))]
    for batches in ([whole], parts, reversed(parts)):
        loss, _ = mean_loss(made, batches)
        assert loss == pytest.approx(expected, rel=1e-5)


class Oracle(nn.Module):
    """Predicts the next token where `right` holds, else another one."""

    def __init__(self, right: Tensor) -> None:
        super().__init__()
        self.weight, self.right = nn.Parameter(torch.zeros(1)), right

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        following = input_ids.roll(-1, dims=1)
        said = torch.where(self.right, following, (following + 1) % 50)
        return SimpleNamespace(logits=nn.functional.one_hot(said, 50).float())


def test_accuracy_counts_labelled_targets_alone() -> None:
    batch = labelled(5, 30)
    counts = batch.labels[:, 1:] != -100
    right = torch.rand(5, 30, generator=torch.Generator().manual_seed(3)) < 0.3
    expected = (right[:, :-1] & counts).sum() / counts.sum()
    assert mean_loss(Oracle(right), [batch])[1] == pytest.approx(expected.item())
    assert mean_loss(Oracle(torch.ones_like(right)), [batch])[1] == 1.0


def test_segments_are_passed_on() -> None:
    made, ids = model("rope"), windows(2, 24)
    segments = torch.arange(24).div(8, rounding_mode="floor").expand(2, -1) + 1
    labels = ids.clone()
    labels[:, ::8] = -100
    packed, _ = mean_loss(made, [Batch(ids, labels, segments)])
    apart = ids.reshape(6, 8)
    separate, _ = mean_loss(made, [Batch(apart, apart)])
    assert packed == pytest.approx(separate, rel=1e-4)


def test_the_mode_of_the_model_is_left_as_it_was_and_dropout_is_off() -> None:
    made = model("rope")
    batch = labelled(2, 16)
    expected = mean_loss(made, [batch])
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    made.train()
    assert mean_loss(made, [batch]) == expected
    assert made.training


def test_nothing_labelled_is_an_error() -> None:
    ids = windows(1, 8)
    with pytest.raises(ValueError, match="no labelled token"):
        mean_loss(model("rope"), [Batch(ids, torch.full_like(ids, -100))])


def test_tables_of_positions_limit_the_length() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    assert table_length(model("learned")) == 96
    assert table_length(model("learned", max_length=200)) == 200
    for name in ("rope", "pope", "sinusoidal", "alibi"):
        assert table_length(model(name)) is None
    gpt2 = GPT2LMHeadModel(
        GPT2Config(n_positions=24, n_embd=8, n_layer=1, n_head=1, vocab_size=50)
    )
    assert table_length(gpt2) == 24
    opt = OPTForCausalLM(
        OPTConfig(
            max_position_embeddings=24,
            hidden_size=8,
            word_embed_proj_dim=8,
            ffn_dim=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=50,
        )
    )
    assert table_length(opt) == 24
