"""What the PoPE paper reports for its zero-shot tasks (arXiv 2509.10534, v3)."""

from __future__ import annotations

TASKS = {
    "lambada_openai": "acc",
    "blimp": "acc",
    "cbt": "acc",
    "hellaswag": "acc",
    "piqa": "acc",
    "arc_easy": "acc",
}
"""The six tasks, each with the metric taken here. The paper says only that they are as the harness
defines them; for HellaSwag, PIQA and ARC-Easy the harness gives acc_norm, too."""

MEANS = {
    "RoPE": {"124M": 45.33, "253M": 48.76, "774M": 51.80},
    "PoPE": {"124M": 46.19, "253M": 48.78, "774M": 52.46},
}
"""Mean accuracy in % over the six tasks, BLiMP and CBT as means over their sub-tasks; its
figures of single tasks are not at hand."""

LONGBENCH = tuple(
    f"longbench_{name}"
    for name in (
        *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"),
        *("gov_report", "qmsum", "multi_news", "trec", "triviaqa", "samsum"),
        *("passage_count", "passage_retrieval_en"),
    )
)
"""The 14 English tasks of LongBench, of which the RoPE-ID paper (arXiv 2603.18017) gives the mean:
all that are neither Chinese nor code. It does not list them."""
