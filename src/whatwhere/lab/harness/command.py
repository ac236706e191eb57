"""`whatwhere evaluate` and `whatwhere needles` on the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro
from rich.console import Console

from whatwhere.lab.errors import user_errors
from whatwhere.lab.harness.settings import Settings, split_names
from whatwhere.lab.lengths import parse_lengths


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run again; with --tasks, evaluate any model with lm-evaluation-harness.

    Tasks that the output folder has finished are not repeated, and a folder of another model or
    config is refused.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """folder of a run; with --tasks also of a Hugging Face model, or a name on the hub"""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK,TASK,...")] = ()
    """such as lambada_openai,blimp,cbt,hellaswag,piqa,arc_easy; or a YAML file or a folder"""
    data: Path | None = None
    """folder of local data files in place of the hub, see docs/evaluation.md"""
    include_path: tuple[Path, ...] = ()
    """folders of more tasks, by whose names they can be called"""
    lengths: Annotated[tuple[str, ...], tyro.conf.arg(metavar="N,N,...")] = ()
    """prompt lengths of the harness's RULER: 4096,8192"""
    batch_size: str = "1"
    """sequences at once, or auto"""
    limit: float | None = None
    """documents of each task, or a share below 1: for tests only"""
    num_fewshot: int | None = None
    """examples before each document; each task's own number by default"""
    max_length: int | None = None
    """tokens that the model reads; its config's by default"""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16"""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU if there is one"""
    seed: int | None = None
    """one seed for all that draws; the harness's own by default"""
    bootstrap: int = 100_000
    """resamples for standard errors without a closed form (LAMBADA's perplexity); 0 is none"""
    log_samples: bool = False
    """write every document with the model's answer"""
    revision: str = "main"
    """of a model on the hub"""
    trust_remote_code: bool = False
    """run Python code that comes with a model or tokenizer"""
    output: Path | None = None
    """folder of results; RUN/harness or runs/harness/MODEL by default"""

    def run(self) -> None:
        """Evaluate."""
        if not self.tasks:
            self._again()
            return
        with user_errors():
            settings = self._settings()
            settings.check()
            _need_harness()
            from whatwhere.lab.harness import running, subject, table

            label = subject.find(settings.model).label
            results = running.run(settings, _say)
        Console().print(table.show(results, label))
        _say(f"results: {settings.output or subject.find(settings.model).folder}")

    def _settings(self) -> Settings:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given["include"] = given.pop("include_path")
        given["tasks"] = split_names(self.tasks)
        given["lengths"] = tuple(parse_lengths(self.lengths))
        return Settings(**given)

    def _again(self) -> None:
        from whatwhere.lab.compare import evaluate_again, summary
        from whatwhere.lab.report.page import unit_of

        with user_errors():
            changed = [
                field.name
                for field in fields(self)
                if field.name != "model" and getattr(self, field.name) != field.default
            ]
            if changed:
                raise ValueError(f"{changed[0].replace('_', '-')}: needs --tasks")
            run = evaluate_again(Path(self.model))
        results = pd.read_csv(run.results, dtype={"encoding": str})
        Console().print(summary(results, unit_of(run.config)))


@dataclass(frozen=True)
class Needles:
    """Hide facts in books at known depths, and ask for them: tasks for evaluate and lm_eval.

    Prompts have the lengths asked for, to a few tokens below, under the tokenizer given. A length
    too short for a kind is left out and said.
    """

    text: tuple[str, ...]
    """UTF-8 files, folders or patterns: the books"""
    tokenizer: str
    """bytes, a run or model with its tokenizer, or a tokenizer's folder or hub name"""
    output: Path
    """folder for the tasks, new: evaluate it with --tasks FOLDER"""
    lengths: Annotated[tuple[str, ...], tyro.conf.arg(metavar="N,N,...")] = ()
    """of prompt and answer in tokens; 256 to 131072, doubled each time, by default"""
    kinds: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KIND,KIND,...")] = ()
    """single,multikey,multivalue,multiquery,tracking,counting: all by default"""
    items: int = 50
    """prompts of each kind and length, their depths spread evenly"""
    seed: int = 0
    """of all that is drawn"""
    name: str = "needles"
    """beginning of the tasks' names"""

    def run(self) -> None:
        """Write."""
        from whatwhere.lab.harness.needles.settings import NeedleSettings
        from whatwhere.lab.harness.needles.write import write

        with user_errors():
            given = {
                "lengths": tuple(parse_lengths(self.lengths)),
                "kinds": split_names(self.kinds),
            }
            settings = NeedleSettings(
                self.text,
                self.tokenizer,
                self.output,
                items=self.items,
                seed=self.seed,
                name=self.name,
                **{key: value for key, value in given.items() if value},  # type: ignore[arg-type]
            )
            folder = write(settings, _say)
        _say(f"tasks: {folder}")


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"--tasks needs {error.name}: pip install 'whatwhere[eval]'") from error


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True)
