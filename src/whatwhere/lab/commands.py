"""The commands of the command line: what each takes, and what it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import tyro
from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table

from whatwhere.figures.palette import title
from whatwhere.lab import recipes
from whatwhere.lab.bench.command import Bench
from whatwhere.lab.convert.command import Convert
from whatwhere.lab.data.command import Data
from whatwhere.lab.diagnose.command import Diagnose
from whatwhere.lab.errors import UserError, user_errors
from whatwhere.lab.finetune.command import Finetune
from whatwhere.lab.harness.command import Evaluate, Needles
from whatwhere.lab.lengths import parse_lengths
from whatwhere.lab.plan.command import EVERYTHING, Plan, everything
from whatwhere.lab.process import is_main_process, main_process_first
from whatwhere.lab.recipes import Recipe
from whatwhere.lab.recipes.files import describe_error
from whatwhere.lab.results.command import Results
from whatwhere.lab.storage import disk_errors

if TYPE_CHECKING:
    from whatwhere.lab.compare import Comparison

YAML = (".yaml", ".yml")


class Command(Protocol):
    """What a command line is parsed into."""

    def run(self) -> None:
        """Do it."""


class OneRun(Recipe):
    """A recipe on the command line of `train`, which has `--seed` in place of `--seeds`."""

    seeds: Annotated[tuple[int, ...], tyro.conf.Suppress] = Field(default=(0,))


@dataclass(frozen=True)
class Recipes:
    """List the recipes, or print one as YAML that `compare` takes, edited or not."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
    """recipe to print; none lists them all"""
    preset: str = "quick"
    """quick (a CPU) or paper (as a paper has it)"""

    def run(self) -> None:
        """List or print."""
        if self.name is None:
            Console().print(_listing())
            return
        with user_errors():
            sys.stdout.write(recipes.to_yaml(recipes.get(self.name, self.preset)))


@dataclass(frozen=True)
class Compare:
    """Train models that differ in their position encoding alone, evaluate them, report.

    Finished runs are not repeated, an unfinished one is resumed. The options below stand for the
    recipe that is named; any of its values can be given here.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """name of a recipe (see `whatwhere recipes`) or a YAML file"""
    settings: Annotated[Recipe, tyro.conf.arg(name="")]
    preset: str | None = None
    """quick (a CPU, the default) or paper (as a paper has it)"""
    encodings: tuple[str, ...] = ()
    """labels of the recipe's encodings, or any names in whatwhere.ENCODINGS"""
    text: tuple[str, ...] = ()
    """UTF-8 files, folders or patterns to train and evaluate on; none is the recipe's own text"""
    source: Annotated[tuple[str, ...], tyro.conf.arg(name="from", metavar="PATH")] = ()
    """raw files of the recipe's data set, or a folder of `whatwhere data prepare`"""
    output: Path | None = None
    """folder of runs, results and report; runs/RECIPE by default"""

    def run(self) -> None:
        """Compare."""
        _compare(self.settings, self.encodings, self.text, self.source, self.output)


@dataclass(frozen=True)
class Train:
    """Train and evaluate one encoding with one seed; `compare` finds the run and reuses it."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """name of a recipe (see `whatwhere recipes`) or a YAML file"""
    settings: Annotated[OneRun, tyro.conf.arg(name="")]
    encoding: str
    """label of one of the recipe's encodings, or any name in whatwhere.ENCODINGS"""
    seed: int = 0
    """seed of weights, batches and dropout"""
    preset: str | None = None
    """quick (a CPU, the default) or paper (as a paper has it)"""
    text: tuple[str, ...] = ()
    """UTF-8 files, folders or patterns to train and evaluate on; none is the recipe's own text"""
    source: Annotated[tuple[str, ...], tyro.conf.arg(name="from", metavar="PATH")] = ()
    """raw files of the recipe's data set, or a folder of `whatwhere data prepare`"""
    output: Path | None = None
    """folder of runs, results and report; runs/RECIPE by default"""

    def run(self) -> None:
        """Train."""
        with user_errors():
            content = self.settings.model_dump() | {"seeds": (self.seed,)}
            recipe = Recipe.model_validate(content)
        _compare(recipe, (self.encoding,), self.text, self.source, self.output)


@dataclass(frozen=True)
class Extrapolate:
    """Measure the loss of a run, or of any causal language model, at given lengths."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """folder of a run, or of a Hugging Face causal language model with its tokenizer"""
    lengths: Annotated[tuple[str, ...], tyro.conf.arg(metavar="N,N,...")]
    """lengths in tokens: 1024,2048,4096"""
    text: tuple[str, ...] = ()
    """UTF-8 files, folders or patterns; none is a run's own validation text"""
    tokens: int = 2**17
    """tokens measured at each length"""
    output: Path | None = None
    """where CSV files and the figure go; RUN/extrapolate or runs/extrapolate/MODEL by default"""

    def run(self) -> None:
        """Extrapolate."""
        from whatwhere.lab import extrapolate

        with user_errors():
            lengths = parse_lengths(self.lengths)
            subject = extrapolate.find_subject(self.folder)
            found = extrapolate.extrapolate(subject, self.text, lengths, self.tokens)
        Console().print(extrapolate.table(found, subject))
        default = subject.run.folder / "extrapolate" if subject.run else None
        folder = self.output or default or Path("runs") / "extrapolate" / subject.name
        for path in extrapolate.write(found, folder, subject):
            print(path)


@dataclass(frozen=True)
class Report:
    """Write the report of a comparison again, from whatever its folder holds."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """folder of a comparison, such as runs/text"""

    def run(self) -> None:
        """Report."""
        from whatwhere.lab.report.page import build_report

        with user_errors():
            if not (self.folder / "settings.yaml").exists():
                raise ValueError(f"{self.folder} is no comparison: it holds no settings.yaml")
            with disk_errors(self.folder):
                print(build_report(self.folder))


COMMANDS: dict[str, type[Command]] = {
    "recipes": Recipes,
    "compare": Compare,
    "train": Train,
    "plan": Plan,
    "evaluate": Evaluate,
    "extrapolate": Extrapolate,
    "diagnose": Diagnose,
    "needles": Needles,
    "report": Report,
    "bench": Bench,
    "convert": Convert,
    "finetune": Finetune,
    "results": Results,
    "data": Data,
}


def parse(arguments: Sequence[str]) -> Command:
    """Parse a command line; the recipe that it names decides options and their defaults.

    Raises:
        UserError: If there is no such recipe, no recipe where one is needed, or values do not go
            together.
        SystemExit: After help, or with code 2 after options that do not parse.
    """
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        return _list_commands(arguments)
    defaults: dict[str, Any] = {}
    if name in ("compare", "train", "plan"):
        with user_errors():
            if (name, *arguments[1:2]) == ("plan", EVERYTHING):
                recipe, given = everything(), EVERYTHING
            else:
                recipe, given = _named_recipe(arguments[1:])
            one = OneRun.model_validate(recipe.model_dump())
        choices = {
            "compare": Compare(given, recipe),
            "train": Train(given, one, tyro.MISSING),
            "plan": Plan(given, recipe),
        }
        defaults["default"] = choices[name]
    try:
        command: Command = tyro.cli(
            COMMANDS[name],
            args=arguments[1:],
            prog=f"whatwhere {name}",
            config=(tyro.conf.AvoidSubcommands,),
            **defaults,
        )
    except ValidationError as error:  # tyro answers those of a recipe's parts, not of the whole
        raise UserError(describe_error(error)) from error
    return command


def _list_commands(arguments: Sequence[str]) -> Command:
    # Help, or the error of a command that does not exist: their options do not matter.
    def listed(command: type[Command]) -> Any:
        def nothing() -> None:
            return None

        nothing.__doc__ = (command.__doc__ or "").split("\n\n")[0]
        return nothing

    tyro.extras.subcommand_cli_from_dict(
        {name: listed(command) for name, command in COMMANDS.items()},
        args=arguments,
        prog="whatwhere",
        description="Train decoders that differ in their position encoding, and compare them.",
    )
    raise AssertionError("help or an error ends the process")


def _named_recipe(arguments: Sequence[str]) -> tuple[Recipe, str]:
    # Read before all else, as options and their defaults follow from it.
    asks_help = {"-h", "--help"} & set(arguments)
    if not arguments or arguments[0].startswith("-"):
        if not asks_help:
            raise ValueError(
                "name a recipe first: one that `whatwhere recipes` lists, or a file that ends in "
                ".yaml"
            )
        return recipes.get("text"), "text"
    name = arguments[0]
    given = [
        value.removeprefix("--preset=") if "=" in value else following
        for value, following in zip(arguments, [*arguments[1:], ""], strict=True)
        if value == "--preset" or value.startswith("--preset=")
    ]
    if name.endswith(YAML):
        if given:
            raise ValueError(f"{name} is a file, which has no --preset")
        return recipes.from_yaml(Path(name)), name
    return recipes.get(name, given[-1] if given else "quick"), name


def _compare(
    recipe: Recipe,
    labels: Sequence[str],
    text: Sequence[str],
    source: Sequence[str],
    output: Path | None,
) -> None:
    from whatwhere.lab.compare import Comparison, choose

    with user_errors(), main_process_first():
        recipe = _with_paths(recipe, text, source)
        folder = output or Path("runs") / recipe.name
        comparison = Comparison(choose(recipe, labels), folder)
    if not is_main_process():
        comparison.run()
        return
    _announce(comparison)
    report = comparison.run()
    comparison.show()
    print(f"report: {report}")


def _with_paths(recipe: Recipe, text: Sequence[str], source: Sequence[str]) -> Recipe:
    # --text is for recipes of any text, --from for those and data sets by name.
    data = recipe.data
    if text and source:
        raise ValueError("--text and --from: give one of them")
    if text and data.task != "text":
        hint = f": its data set {data.dataset!r} takes --from" if data.task == "tokens" else ""
        raise ValueError(f"--text: the data of recipe {recipe.name!r} is not text{hint}")
    if source and data.task == "indirect-indexing":
        raise ValueError(f"--from: recipe {recipe.name!r} makes its own data")
    if not text and not source:
        return recipe
    paths = data.model_validate(data.model_dump() | {"paths": tuple(text or source)})
    return recipe.model_copy(update={"data": paths})


def _announce(comparison: Comparison) -> None:
    recipe, data = comparison.recipe, comparison.description
    source = data.get("source", recipe.data.task)
    training = recipe.training
    seeds = ", ".join(map(str, recipe.seeds))
    Console().print(
        f"{recipe.name}: {', '.join(recipe.encodings)}; seeds {seeds}; {training.steps} steps "
        f"of {training.batch_size} x {comparison.task.length} tokens; "
        f"data: {source}; folder: {comparison.folder}",
        highlight=False,
        soft_wrap=True,
    )


def _listing() -> Table:
    # One row a recipe, as its paper has it where one does.
    table = Table(title="recipes", title_justify="left", show_lines=True)
    for column in ("name", "presets", "what it is", "figures of the paper"):
        table.add_column(column, overflow="fold")
    for name in recipes.names():
        presets = recipes.presets(name)
        recipe = recipes.get(name, "paper" if "paper" in presets else presets[0])
        what = recipe.description.split(". ")[0].split(": minutes")[0]
        table.add_row(name, ", ".join(presets), what, _figures(recipe))
    return table


def _figures(recipe: Recipe) -> str:
    # RoPE 0.5081, PoPE 0.4889: the metrics of a recipe one after the other.
    found: dict[str, list[str]] = {}
    for label, figures in recipe.paper.items():
        for metric, figure in figures.items():
            words, _, length = metric.replace("_", " ").partition("@")
            head = f"{words} at {int(length):,}" if length else words
            found.setdefault(head, []).append(f"{title(label)} {figure.value:.4g}")
    return "; ".join(f"{head}: {', '.join(values)}" for head, values in found.items())
