"""Loss against fine-tuning tokens of a PoPE model that starts from a RoPE model's weights.

    whatwhere compare text --text my_books/ --encodings rope pope --seeds 0 1 --output runs/text
    python benchmarks/rope_to_pope.py runs/text --output runs/rope_to_pope --seeds 0 1

Each start is `whatwhere.models.initialise`'s; ``plain`` changes nothing but the encoding, and
``rope`` goes on training the RoPE model itself, with the same batches. The learning rate is
constant after its warm-up. Batches are of another seed than the training's. A run that was
stopped goes on where it was, and one that has ended is not repeated. Writes curve.csv, curve.png,
curve.svg and lengths.csv (losses at the training length and at four times that).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn

from whatwhere.figures.palette import Style
from whatwhere.figures.style import GREY, RC
from whatwhere.lab import runs, storage
from whatwhere.lab.data import TextTask, make_task
from whatwhere.lab.evaluate import length_loss, load_model, mean_loss, rows_for
from whatwhere.lab.recipes.schema import EncodingChoice
from whatwhere.lab.report.canvas import End, canvas, end_labels, save
from whatwhere.lab.train import train
from whatwhere.models import WhatWhereConfig, WhatWhereForCausalLM
from whatwhere.models.initialise import (
    PolarStart,
    from_centres,
    from_order,
    from_scores,
    from_signs,
    recombined,
)
from whatwhere.models.score_distil import distilled

STYLES = {
    "plain": Style("PoPE, RoPE's weights as they are", "#7f7f7f", "X"),
    "order": Style("PoPE, channels by frequency", "#e69f00", "D"),
    "signs": Style("PoPE, signs (QK-Norm)", "#cc79a7", "v"),
    "centres": Style("PoPE, centres", "#56b4e9", "s"),
    "scores": Style("PoPE, scores fitted", "#0072b2", "o"),
    "distilled": Style("PoPE, scores fitted, distilled", "#009e73", "p"),
    "distilled-zero": Style("PoPE, delta 0, distilled", "#222222", "P"),
    "rope": Style("RoPE, trained on", "#d55e00", "^"),
}
FITTED = 8  # windows that scores are fitted to; distillation takes all
OTHER_BATCHES = 1000  # added to a seed: fine-tuning must not repeat the first batches of training


def calibration(model: Any, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries (N, H, T, D) and keys (N, G, T, D) of each layer, before rotation."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.__setitem__(name, output)

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "k_proj"))
    ]
    with torch.inference_mode():
        model.eval()(input_ids=windows.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    split = (-1, model.config.head_dim)
    states = [x.unflatten(-1, split).transpose(1, 2).clone() for x in found.values()]
    return list(zip(states[::2], states[1::2], strict=True))


def start_of(name: str, rope: Any, pope: Any, q: Tensor, k: Tensor) -> PolarStart:
    """The start of one layer; ``rope`` and ``pope`` are its encodings."""
    heads, width = q.shape[1], q.shape[-1]
    if name == "order":
        return from_order(heads, k.shape[1], width, width, rope.scale)
    if name in ("signs", "centres"):
        return {"signs": from_signs, "centres": from_centres}[name](q, k, width, rope.scale)
    frequencies = rope.inv_freq()[0], pope.inv_freq()[0]
    if name == "distilled-zero":
        start = from_order(heads, k.shape[1], width, width, rope.scale)
        return distilled(start, q, k, *frequencies, rope.scale, train="maps")
    start = from_scores(q[:FITTED], k[:FITTED], *frequencies, rope.scale)
    if name == "scores":
        return start
    return distilled(start, q, k, *frequencies, rope.scale)


def converted(source: Any, name: str, windows: Tensor) -> Any:
    """A PoPE model from a RoPE model by one of the starts."""
    old = source.config.to_dict()
    old["position_encoding"] = "pope"
    model = WhatWhereForCausalLM(WhatWhereConfig.from_dict(old))
    missing = model.load_state_dict(source.state_dict(), strict=False).missing_keys
    assert all(key.endswith("delta") for key in missing), missing
    if name == "plain":
        return model
    for before, block, (q, k) in zip(
        source.model.blocks, model.model.blocks, calibration(source, windows), strict=True
    ):
        attention = block.self_attn
        start = start_of(name, before.self_attn.encoding, attention.encoding, q, k)
        for projection, maps in (
            (attention.q_proj, start.queries),
            (attention.k_proj, start.keys),
        ):
            projection.weight = nn.Parameter(recombined(maps, projection.weight.detach()))
        attention.encoding.delta.data.copy_(start.delta)
    model.set_position_encoding("pope", scale=start.scale)
    return model


@dataclasses.dataclass
class Args:
    """Fine-tune PoPE from RoPE's weights and draw the curve."""

    folder: tyro.conf.Positional[Path]
    """A comparison on text with trained runs of rope and pope."""
    output: Path = Path("runs/rope_to_pope")
    """Where runs and curve go."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the runs to start from."""
    starts: tuple[str, ...] = (
        "plain",
        "order",
        "centres",
        "scores",
        "distilled",
        "distilled-zero",
        "rope",
    )
    """Among plain, order, signs, centres, scores, distilled, distilled-zero, rope."""
    steps: int = 500
    """Optimizer steps of each."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    learning_rate: float = 2e-4
    """Constant after the warm-up."""
    validate_every: int = 25
    """Steps between points of the curve."""
    windows: int = 24
    """Windows of training text that starts are made with."""


def fine_tune(args: Args, name: str, seed: int, source: runs.Run) -> list[dict[str, Any]]:
    """Rows of the curve of one start."""
    task = make_task(source.config.data)
    assert isinstance(task, TextTask)
    training = source.config.training.model_copy(
        update={
            "steps": args.steps,
            "warmup_steps": args.warmup_steps,
            "learning_rate": args.learning_rate,
            "min_learning_rate": args.learning_rate,
            "validate_every": args.validate_every,
            "checkpoint_every": args.validate_every,
        }
    )
    old = load_model(source.model)
    windows = task.train_batch(seed + 2 * OTHER_BATCHES, 0, args.windows).input_ids
    model = old if name == "rope" else converted(old, name, windows)
    encoding = model.config.position_encoding
    config = source.config.model_copy(
        update={
            "label": name,
            "seed": seed + OTHER_BATCHES,
            "encoding": EncodingChoice(
                name=encoding, options=model.config.position_encoding_options
            ),
            "training": training,
        }
    )
    run = runs.Run(args.output / f"{name}-seed{seed}", config)
    runs.claim(run, task.describe(), source)
    first = run.folder / "start"
    if not first.exists():
        with storage.new_folder(first) as folder:
            model.save_pretrained(folder)
    size = rows_for(task.length, task.vocab_size)
    batches = task.evaluation_batches("validation", size, training.validation_sequences)
    points = [(0, mean_loss(load_model(first), batches)[0])]
    if not run.trained:
        train(run, task, initial=first)
    points += [
        (row["step"], row["validation_loss"])
        for row in map(json.loads, run.log.read_text().splitlines())
        if "validation_loss" in row
    ]
    tokens = training.batch_size * task.length
    return [row_of(name, seed, step, step * tokens, loss) for step, loss in points]


def beyond(args: Args, name: str, seed: int, source: runs.Run) -> list[dict[str, Any]]:
    """Loss at the training length and at four times that, before and after fine-tuning."""
    task = make_task(source.config.data)
    assert isinstance(task, TextTask)
    folder = args.output / f"{name}-seed{seed}"
    return [
        {
            "start": name,
            "seed": seed,
            "fine_tuned": after,
            "length": length,
            "loss": length_loss(
                load_model(folder / ("model" if after else "start")).eval(),
                task.windows(length, 48 * task.length // length),
            ).loss,
        }
        for after in (False, True)
        for length in (task.length, 4 * task.length)
    ]


def row_of(start: str, seed: int, step: int, tokens: int, loss: float) -> dict[str, Any]:
    return {"start": start, "seed": seed, "step": step, "tokens": tokens, "loss": loss}


def level(run: runs.Run, name: str) -> dict[str, Any]:
    """Loss of a finished run, on the same windows as the curve's."""
    task = make_task(run.config.data)
    size = rows_for(task.length, task.vocab_size)
    wanted = run.config.training.validation_sequences
    loss, _ = mean_loss(load_model(run.model), task.evaluation_batches("validation", size, wanted))
    steps = run.config.training.steps
    tokens = steps * run.config.training.batch_size * task.length
    return row_of(name, run.config.seed, steps, tokens, loss)


@context(RC, after_reset=True)
def draw(table: pd.DataFrame, unit: str, note: str) -> Figure:
    """Mean over seeds, and each seed as a thin line; the axis ends where most curves are."""
    levels = table[table["start"].str.startswith("level")]
    curves = table.drop(levels.index)
    last = curves["tokens"].max()
    ends = []
    for name, part in curves.groupby("start", sort=False):
        mean = part.groupby("tokens")["loss"].mean()
        values = f"{mean.iloc[0]:.2f} \N{RIGHTWARDS ARROW} {mean.iloc[-1]:.3f}"
        ends.append(End(float(mean.index[-1]), mean.iloc[-1], STYLES[str(name)], values))
    for name, part in levels.groupby("start", sort=False):
        text = str(name).removeprefix("level: ")
        mean_level = part["loss"].mean()
        ends.append(End(last, mean_level, Style(text, GREY, "", "--"), f"{mean_level:.3f}"))
    place = canvas("PoPE from a RoPE model's weights: loss against fine-tuning", False, ends)
    place.note(note)
    for name, part in curves.groupby("start", sort=False):
        style = STYLES[str(name)]
        for _, one in part.groupby("seed"):
            place.axes.plot(one["tokens"], one["loss"], color=style.colour, linewidth=0.7)
        mean = part.groupby("tokens")["loss"].mean()
        place.axes.plot(mean.index, mean, color=style.colour, marker=style.marker, markersize=6)
    for _, part in levels.groupby("start"):
        place.axes.axhline(part["loss"].mean(), color=GREY, linewidth=1.4, linestyle="--")
    place.axes.set_xlabel("tokens of fine-tuning")
    place.axes.set_ylabel(f"loss on other text, nats per {unit}")
    lowest = table["loss"].min()
    place.axes.set_ylim(lowest - 0.02, lowest + 0.4)
    place.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.0f} k"))
    end_labels(place, ends)
    return place.figure


def main(args: Args) -> None:
    """Fine-tune every start of every seed, then write the table and the figure."""
    rows: list[dict[str, Any]] = []
    lengths: list[dict[str, Any]] = []
    for seed in args.seeds:
        rope = runs.load_run(args.folder / f"rope-seed{seed}")
        rows.append(level(rope, "level: RoPE before"))
        pope = args.folder / f"pope-seed{seed}"
        if pope.exists() and (found := runs.load_run(pope)).trained:
            rows.append(level(found, "level: PoPE from scratch"))
        for name in args.starts:
            rows += fine_tune(args, name, seed, rope)
            lengths += beyond(args, name, seed, rope)
            storage.write_rows(args.output / "curve.csv", rows, list(rows[0]))
            storage.write_rows(args.output / "lengths.csv", lengths, list(lengths[0]))
    settings = rope.config
    shape, training = settings.model, settings.training
    note = (
        f"{shape.num_hidden_layers} layers x {shape.hidden_size}, {shape.num_attention_heads} "
        f"heads, length {settings.data.length}, {training.steps:,} steps of RoPE; then constant "
        f"rate {args.learning_rate:g}, batch {training.batch_size}; "
        f"mean of {len(args.seeds)} seed(s)"
    )
    unit = "byte" if settings.data.tokenizer == "bytes" else "token"
    for path in save(draw(pd.DataFrame(rows), unit, note), args.output / "curve"):
        print(path)


if __name__ == "__main__":
    main(tyro.cli(Args))
