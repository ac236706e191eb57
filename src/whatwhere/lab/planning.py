"""What a comparison consists of: which runs, which of them start from others, and how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

import whatwhere as ww
from whatwhere.lab import runs
from whatwhere.lab.data import IndirectIndexingData
from whatwhere.lab.recipes.files import from_yaml, to_yaml
from whatwhere.lab.recipes.schema import EncodingChoice, Recipe
from whatwhere.lab.runs import Run

# Options of YaRN that the rope run it is made from knows nothing of.
_YARN_ONLY = ("beta_fast", "beta_slow")

How = Literal["train", "finetune", "borrow"]


@dataclass(frozen=True)
class Planned:
    """A run, and where its weights come from.

    Attributes:
        run: The run.
        how: It is trained, fine-tuned from a source, or borrows the weights of one.
        source: The run that these weights are of, unless it is trained from the start.
    """

    run: Run
    how: How = "train"
    source: Run | None = None

    @property
    def lender(self) -> Run | None:
        """The run whose weights are evaluated as they are."""
        return self.source if self.how == "borrow" else None

    @property
    def weights(self) -> Run:
        """The run whose model this one is evaluated with."""
        return self.lender or self.run


def choose(recipe: Recipe, labels: Iterable[str]) -> Recipe:
    """The recipe with these encodings alone, in this order.

    Args:
        recipe: A recipe.
        labels: Labels of its encodings, ``ours`` for all that it has and no paper has, or any
            names in `whatwhere.ENCODINGS`, which then have their default options. None at all
            keeps the recipe's.

    Raises:
        ValueError: If a label is neither, or comes twice.
    """
    chosen: dict[str, EncodingChoice] = {}
    own = {**recipe.ours, **recipe.encodings}
    for label in labels:
        if label in chosen:
            raise ValueError(f"encodings: {label!r} comes twice")
        if label in own:
            chosen[label] = own[label]
        elif label == "ours" and recipe.ours:
            chosen |= recipe.ours
        elif label in ww.ENCODINGS:
            chosen[label] = EncodingChoice(name=label)
        else:
            known = list(dict.fromkeys([*own, *ww.ENCODINGS]))
            close = get_close_matches(label, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"encodings: unknown {label!r}{hint}: expected some of {', '.join(known)}"
            )
    if not chosen:
        return recipe
    for choice in list(chosen.values()):  # what one is fine-tuned from is needed, too
        source = choice.finetune_from
        if source is not None and source not in chosen:
            chosen = {source: own[source], **chosen}
    return recipe.model_copy(update={"encodings": chosen})


def with_sources(recipe: Recipe) -> Recipe:
    """The recipe with the rope run that each YaRN is made from, even where none is asked for.

    Raises:
        ValueError: If YaRN is given a factor, which follows from the lengths.
    """
    encodings = dict(recipe.encodings)
    for label, choice in recipe.encodings.items():
        if choice.name == "yarn" and "factor" in choice.options:
            raise ValueError(
                f"encoding {label!r}: its factor follows from the lengths (or is that of "
                "evaluation.finetune): leave it out"
            )
        if choice.name == "yarn" and _source_label(recipe, label) not in encodings:
            encodings = {"rope": _rope_of(choice), **encodings}
    return recipe.model_copy(update={"encodings": encodings})


def plan_all(settings: Recipe, asked: Recipe, folder: Path) -> list[Planned]:
    """All runs: what this command asks for, each after the one it is made from, then the others.

    Args:
        settings: With the encodings and seeds of earlier commands.
        asked: The recipe of this command.
        folder: Of the comparison. Others are what earlier commands have trained there: checked,
            and evaluated again if need be.
    """

    def is_made(label: str) -> bool:
        return _source_label(settings, label) is not None

    first, then = [], []
    for seed in settings.seeds:
        for label in sorted(settings.encodings, key=is_made):
            planned = plan_one(settings, label, seed, folder)
            if label in asked.encodings and seed in asked.seeds:
                first.append(planned)
            elif planned.run.trained or planned.run.evaluated:
                then.append(planned)
    return first + then


def plan_one(settings: Recipe, label: str, seed: int, folder: Path) -> Planned:
    """The run of one encoding and seed, and the one its weights come from."""
    run = runs.plan(settings, label, seed, folder)
    source_label = _source_label(settings, label)
    # Trained by another recipe: its folder lies beside this one's.
    trainer = settings.trained_by
    place = folder.absolute().parent / trainer if trainer else folder
    if source_label is None:
        if trainer is None:
            return Planned(run)
        return Planned(run, "borrow", runs.plan(settings, label, seed, place))
    source = runs.plan(settings, source_label, seed, place)
    if not _is_finetuned(settings, label):
        return Planned(run, "borrow", source)
    return Planned(Run(run.folder, finetuned(run.config)), "finetune", source)


def trainer_of(recipe: Recipe, base: Recipe | None) -> Recipe:
    """The recipe that trains the models which `recipe` only evaluates or fine-tunes.

    Args:
        recipe: One with `trained_by`.
        base: The recipe of that name, whose evaluation is kept, if there is one.
    """
    own = {
        label: choice
        for label, choice in recipe.encodings.items()
        if _source_label(recipe, label) is None
    }
    update: dict[str, Any] = {
        "name": recipe.trained_by,
        "trained_by": None,
        "encodings": own,
        "evaluation": base.evaluation if base else type(recipe.evaluation)(),
        "description": base.description if base else "",
        "paper": base.paper if base else {},
    }
    return recipe.model_copy(update=update)


def finetuned(config: runs.RunConfig) -> runs.RunConfig:
    """The config of a run that is fine-tuned at a longer length (arXiv 2509.10534, appendix).

    Length and YaRN's factor grow together; the learning rate is constant after its warm-up.

    Raises:
        ValueError: If the task has one length.
    """
    settings = config.evaluation.finetune
    if isinstance(config.data, IndirectIndexingData):
        raise ValueError(f"encoding {config.label!r}: fine-tuning needs a task of texts")
    training = config.training.model_copy(
        update={
            "steps": settings.steps,
            "warmup_steps": settings.warmup_steps,
            "learning_rate": settings.learning_rate,
            "min_learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
        }
    )
    longer = {"length": config.data.length * settings.factor}
    options = dict(config.encoding.options)
    if config.encoding.name == "yarn":
        options["factor"] = float(settings.factor)
    return config.model_copy(
        update={
            "training": training,
            "data": config.data.model_copy(update=longer),
            "encoding": config.encoding.model_copy(update={"options": options}),
        }
    )


def merged_settings(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the encodings and seeds that earlier commands put into the folder.

    Raises:
        ValueError: If the folder was written by another config; the line names what differs.
    """
    path = folder / "settings.yaml"
    if not path.exists():
        return recipe
    earlier = from_yaml(path)
    # Paths do not count: whether the text is the same is checked run by run.
    apart = {"encodings", "ours", "seeds", "evaluation", "description", "paper", "preset"}
    changed = runs.differences(plain(earlier, apart), plain(recipe, apart))
    for label in recipe.encodings.keys() & earlier.encodings.keys():
        old, new = earlier.encodings[label], recipe.encodings[label]
        changed += runs.differences(old.model_dump(), new.model_dump(), f"encodings.{label}")
    if changed:
        listed = "; ".join(changed[:4]) + (" ..." if len(changed) > 4 else "")
        raise ValueError(
            f"{folder} was written by another config ({listed}): choose another --output, or "
            "remove that folder"
        )
    encodings = {**earlier.encodings, **recipe.encodings}
    seeds = tuple(dict.fromkeys([*earlier.seeds, *recipe.seeds]))
    return recipe.model_copy(update={"encodings": encodings, "seeds": seeds})


def _source_label(recipe: Recipe, label: str) -> str | None:
    # The encoding whose run this one is made from.
    choice = recipe.encodings[label]
    if choice.finetune_from is not None:
        return choice.finetune_from
    return _rope_label(recipe, label) if choice.name == "yarn" else None


def _is_finetuned(recipe: Recipe, label: str) -> bool:
    choice = recipe.encodings[label]
    return choice.finetune_from is not None or recipe.evaluation.yarn == "finetune"


def _rope_of(yarn: EncodingChoice) -> EncodingChoice:
    options = {key: value for key, value in yarn.options.items() if key not in _YARN_ONLY}
    return EncodingChoice(name="rope", options=options, qk_norm=yarn.qk_norm)


def _rope_label(recipe: Recipe, yarn: str) -> str:
    wanted = _rope_of(recipe.encodings[yarn])
    same = [label for label, choice in recipe.encodings.items() if choice == wanted]
    if not same and "rope" in recipe.encodings:
        raise ValueError(
            f"encoding {yarn!r} is made from a rope run with options {wanted.options}, but "
            f"'rope' has {recipe.encodings['rope'].options}: add an encoding of that kind"
        )
    return same[0] if same else "rope"


def plain(recipe: Recipe, without: set[str]) -> dict[str, Any]:
    """A recipe as a mapping, without paths, how it is computed, and some of its keys."""
    content: dict[str, Any] = yaml.safe_load(to_yaml(recipe))
    content["data"].pop("paths", None)
    for key in runs.HOW_IT_IS_COMPUTED:
        content["training"].pop(key)
    return {key: value for key, value in content.items() if key not in without}
