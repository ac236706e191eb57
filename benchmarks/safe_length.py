"""How often `whatwhere.analysis.safe_length` was right on models trained here.

    python benchmarks/safe_length.py    # results/results.csv to docs/safe_length.csv

For each recipe, encoding and length beyond training: predicted is ``length <= safe length`` (from
recipe and encoding alone), measured is whether the loss, mean over seeds, is at most 5 % above
that at the training length. 5 % was set down, as the rule was, before any loss was compared with
it; 2 % and 10 % say how much hangs on it. (The losses of ``text`` were known from the README.)
Beside the rule stand two that know nothing: no length beyond training is safe, every length is.

YaRN is evaluated with the factor ``length / training length``, as the recipes do, so that the rule
calls each of its lengths safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

import whatwhere as ww
from whatwhere.analysis.in_distribution import safe_length
from whatwhere.lab import recipes, storage
from whatwhere.lab.recipes.shared import head_dim

ROOT = Path(__file__).resolve().parents[1]
THRESHOLDS = (0.02, 0.05, 0.10)
COLUMNS = (
    *("recipe", "preset", "encoding", "train_length", "length", "seeds", "loss", "loss_rise"),
    *("safe_length", "predicted"),
)


@dataclass(frozen=True)
class Settings:
    """What to read and write.

    Attributes:
        results: Rows of `whatwhere results`.
        output: A CSV.
    """

    results: Path = ROOT / "results" / "results.csv"
    output: Path = ROOT / "docs" / "safe_length.csv"


def predicted(recipe: str, preset: str, label: str, length: int) -> tuple[int | None, int]:
    """Safe length (``None``: no limit) of an encoding of a recipe, and the training length."""
    made = recipes.get(recipe, preset)
    choice = {**made.encodings, **made.ours}[label]
    model, trained = made.model, made.data.length
    more = {"factor": max(1.0, length / trained)} if choice.name == "yarn" else {}
    encoding = ww.make(
        choice.name,
        head_dim=head_dim(model),
        num_heads=model.num_attention_heads,
        train_length=trained,
        **choice.options,
        **more,
    )
    # YaRN knows at which length its frequencies were others.
    return safe_length(encoding, None if choice.name == "yarn" else trained).length, trained


def compared(results: pd.DataFrame) -> pd.DataFrame:
    """A row for each recipe, encoding and length beyond training."""
    rows = []
    losses = results[results["metric"] == "loss"]
    for (recipe, preset, label), cells in losses.groupby(["recipe", "preset", "encoding"]):
        table = cells.pivot_table(index="seed", columns="length", values="value")
        for length in table.columns:
            safe, trained = predicted(recipe, preset, label, int(length))
            if length <= trained or trained not in table:
                continue
            both = table[[trained, length]].dropna()
            rise = float((both[length] / both[trained] - 1).mean())
            ok = safe is None or length <= safe
            loss = round(float(both[length].mean()), 4)
            row = (recipe, preset, label, trained, int(length), len(both), loss)
            rows.append((*row, round(rise, 4), "none" if safe is None else safe, ok))
    made = pd.DataFrame(rows, columns=list(COLUMNS))
    for threshold in THRESHOLDS:
        made[f"measured_{threshold:.0%}"] = made["loss_rise"] <= threshold
    return made


def shares(made: pd.DataFrame) -> pd.DataFrame:
    """How often the rule was right, by encoding, over all, and of the two that know nothing."""
    columns = {f"{t:.0%}": f"measured_{t:.0%}" for t in THRESHOLDS}
    parts = [*made.groupby("encoding"), ("all", made)]
    rows = {
        name: {"cells": len(part)}
        | {key: float((part["predicted"] == part[c]).mean()) for key, c in columns.items()}
        for name, part in parts
    }
    for name, said in (("never safe", False), ("always safe", True)):
        rows[name] = {"cells": len(made)}
        rows[name] |= {key: float((made[c] == said).mean()) for key, c in columns.items()}
    return pd.DataFrame(rows).T.astype({"cells": int})


def main(settings: Settings) -> None:
    made = compared(pd.read_csv(settings.results))
    storage.write_text(settings.output, made.to_csv(index=False, lineterminator="\n"))
    print(made.to_string(index=False))
    print("\nShare of lengths beyond training where the prediction was right, by allowed rise:")
    print(shares(made).round(3).to_string())


if __name__ == "__main__":
    main(tyro.cli(Settings))
