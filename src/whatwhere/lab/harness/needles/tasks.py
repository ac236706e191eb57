"""The YAML of needle tasks: what the harness reads, beside the prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence

GENERATE = """\
task: {task}
custom_dataset: !function string_match.load
test_split: test
output_type: generate_until
doc_to_text: "{{{{input}}}}"
doc_to_target: "{{{{outputs}}}}"
gen_prefix: "{{{{gen_prefix}}}}"
target_delimiter: " "
process_results: !function string_match.process_results
num_fewshot: 0
metric_list:
  - metric: string_match_all
    aggregation: mean
    higher_is_better: true
  - metric: string_match_part
    aggregation: mean
    higher_is_better: true
generation_kwargs:
  do_sample: false
  max_gen_toks: {answer}
  until: []
metadata:
  version: 1.0
  needles: {needles}
"""

CHOOSE = """\
task: {task}
custom_dataset: !function string_match.load
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{input}}}}"
doc_to_choice: options
doc_to_target: answer
gen_prefix: "{{{{gen_prefix}}}}"
target_delimiter: " "
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
  needles: {needles}
"""

GROUP = """\
group: {group}
task:
{members}
aggregate_metric_list:
  - metric: {metric}
    aggregation: mean
    weight_by_size: false
metadata:
  version: 1.0
"""


def generate(task: str, kind: str, length: int, file: str, answer: int) -> str:
    """A task that lets the model write the answer.

    Args:
        task: Name.
        kind: Of needles.
        length: In tokens.
        file: Of the prompts, beside the task.
        answer: Tokens that the model may write.
    """
    return GENERATE.format(task=task, answer=answer, needles=_about(kind, length, file))


def choose(task: str, kind: str, length: int, file: str) -> str:
    """A task that takes the likeliest of the options; arguments as for `generate`."""
    return CHOOSE.format(task=task, needles=_about(kind, length, file))


def group(name: str, members: Sequence[str], metric: str) -> str:
    """A group with the mean of a metric over its tasks."""
    lines = "\n".join(f"  - {member}" for member in members)
    return GROUP.format(group=name, members=lines, metric=metric)


def _about(kind: str, length: int, file: str) -> str:
    return json.dumps({"kind": kind, "length": length, "file": file})  # JSON is YAML, too
