"""What small models retrieve by depth and length: models that were trained to copy.

    python benchmarks/copy_retrieval.py --output runs/copy   # docs/copy_retrieval.{csv,png,svg}

Decoders of two layers read 128 tokens drawn uniformly from 64. In half of the sequences the second
half says the first again, from a random place on and round; in the others a run of 32 stands
twice, at random places (alone these are learned too slowly). The loss is that of what is said
again, from its third token on. The models are then asked by `whatwhere.analysis.copy_items`, up to
four times as long as trained; ``control`` is the token accuracy where the copy was taken out.
A model saved in the output folder is not trained again: name a new one after changing how.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor
from torch.nn.functional import cross_entropy

from whatwhere.analysis import plots
from whatwhere.analysis.retrieval import copy_items, retrieval, without_copy
from whatwhere.lab import storage
from whatwhere.lab.report.canvas import save
from whatwhere.models import WhatWhereConfig, WhatWhereForCausalLM

ROOT = Path(__file__).resolve().parents[1]
LENGTH, VOCABULARY, SPAN, BATCH = 128, 64, 32, 32


@dataclass(frozen=True)
class Settings:
    """What to train and ask.

    Attributes:
        output: Where models are saved.
        encodings: Names in `whatwhere.ENCODINGS`.
        steps: Of training.
        seed: Of weights and data.
        table: The CSV.
    """

    output: Path
    encodings: tuple[str, ...] = ("rope", "pope", "rope-id")
    steps: int = 1000
    seed: int = 0
    table: Path = ROOT / "docs" / "copy_retrieval.csv"


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(B, T)`` tokens, and which of them are to be predicted."""
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    wanted = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    half = LENGTH // 2
    for index, (row, mask) in enumerate(zip(tokens, wanted, strict=True)):
        if index % 2:
            start = int(torch.randint(half, (), generator=generator))
            row[half:] = row[:half].roll(-start)
            mask[half + 2 :] = True
        else:
            first = int(torch.randint(LENGTH - 2 * SPAN + 1, (), generator=generator))
            again = int(torch.randint(first + SPAN, LENGTH - SPAN + 1, (), generator=generator))
            row[again : again + SPAN] = row[first : first + SPAN].clone()
            mask[again + 2 : again + SPAN] = True
    return tokens, wanted


def trained(name: str, settings: Settings) -> WhatWhereForCausalLM:
    """A model with this encoding, from its folder if it is there."""
    folder = settings.output / f"{name}-seed{settings.seed}-{settings.steps}"
    if folder.is_dir():
        return WhatWhereForCausalLM.from_pretrained(folder)
    torch.manual_seed(settings.seed)
    config = WhatWhereConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        position_encoding=name,
    )
    model, steps = WhatWhereForCausalLM(config), settings.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
    )
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(steps):
        tokens, wanted = batch(generator)
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = cross_entropy(logits[wanted[:, 1:]], tokens[wanted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"{name}: step {step + 1} of {steps}, loss {loss:.3f}", flush=True)
    with storage.new_folder(folder) as partial:
        model.save_pretrained(partial)
    return model.eval()


def main(settings: Settings) -> None:
    generator = torch.Generator().manual_seed(settings.seed + 1)
    text = torch.randint(VOCABULARY, (20_000,), generator=generator)
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    items = copy_items(text, (64, 128, 256, 512), depths, items=32)
    tables = []
    for name in settings.encodings:
        model = trained(name, settings)
        found = retrieval(model, items)
        found["control"] = retrieval(model, without_copy(items))["token_accuracy"]
        found.insert(0, "encoding", name)
        tables.append(found)
        wide = found.pivot(index="depth", columns="length", values=["accuracy", "token_accuracy"])
        print(f"\n{name}\n{wide.round(2).to_string()}", flush=True)
    made = pd.concat(tables).round(4)
    storage.write_text(settings.table, made.to_csv(index=False, lineterminator="\n"))
    draw(made, settings.table.with_suffix(""))


def draw(made: pd.DataFrame, path_stem: Path) -> None:
    """The heat map of right tokens, as PNG and SVG."""
    frames = {str(name): frame for name, frame in made.groupby("encoding", sort=False)}
    title = "Tokens of a copied span that are right, by length and depth"
    save(plots.retrieval(frames, LENGTH, column="token_accuracy", title=title), path_stem)


if __name__ == "__main__":
    main(tyro.cli(Settings))
