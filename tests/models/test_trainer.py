"""transformers' Trainer trains these models as any other."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)


def lines(count, seed):
    """Rising sequences, easy to learn: each token is the one before plus the row's step."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 50, (count, 1), generator=draw)
    step = torch.randint(1, 4, (count, 1), generator=draw)
    ids = (start + step * torch.arange(24)) % 50
    sizes = torch.randint(12, 25, (count,), generator=draw).tolist()
    return [
        {"input_ids": row[:n], "labels": row[:n]}
        for row, n in zip(ids.tolist(), sizes, strict=True)
    ]


class Padding:
    """Pads a batch on the right."""

    def __call__(self, rows):
        width = max(len(row["input_ids"]) for row in rows)

        def padded(key, value):
            return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

        mask = [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": torch.tensor(mask),
        }


@pytest.mark.parametrize("collator", [Padding(), DataCollatorWithFlattening()])
@pytest.mark.parametrize("name", ["pope", "learned"])
def test_trains(make, tmp_path, name, collator):
    model = make(name, initializer_range=0.02, max_position_embeddings=32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=40,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=40,
        save_steps=40,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=lines(256, 0),
        eval_dataset=lines(16, 1),
        data_collator=collator,
    )
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    # The mean over tokens starts at ln(50) = 3.9 whatever the accumulation.
    assert 2.5 < losses[0] < 4.2 and losses[-1] < 0.5 * losses[0]
    assert evaluated[-1] < 0.6 * losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-40").eval()
    ids = torch.tensor([lines(1, 2)[0]["input_ids"]])
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
