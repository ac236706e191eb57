"""How fast indirect-indexing examples are made on one CPU thread (wanted: 200,000 a second).

    python benchmarks/indirect_indexing_generation.py

Prints one JSON line: median and best of several rounds; leaves with status 1 below the aim.
"""

import json
import platform
import statistics
import sys
import time

import torch

from whatwhere.lab.data.indirect_indexing import IndirectIndexingData, IndirectIndexingTask

AIM = 200_000
ROUNDS = 7
EXAMPLES = 131_072


def main() -> int:
    torch.set_num_threads(1)
    task = IndirectIndexingTask(IndirectIndexingData())
    indices = torch.arange(EXAMPLES)
    task.examples("train", indices[:4096])
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        task.examples("train", indices)
        rates.append(EXAMPLES / (time.perf_counter() - start))
    median = statistics.median(rates)
    result = {
        "benchmark": "indirect_indexing_generation",
        "examples_per_second_median": round(median),
        "examples_per_second_best": round(max(rates)),
        "aim": AIM,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    return 0 if median >= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
