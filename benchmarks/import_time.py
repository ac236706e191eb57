"""What `import whatwhere` adds to `import torch`, in fresh processes (wanted: under 0.3 s).

python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

import tyro

from interleaved import write

AIM = 0.3
CODE = (
    "import time; import torch; start = time.perf_counter();"
    "import whatwhere; print(time.perf_counter() - start)"
)


def main(count: int = 9) -> int:
    """Measure and write results/import_time.csv; the status is 1 above the aim."""
    taken = [
        float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True).stdout)
        for _ in range(count)
    ]
    median = statistics.median(taken)
    print(f"import whatwhere after torch: {median:.3f} s (aim: under {AIM} s)")
    print(write("import_time", [{"seconds under aim": median < AIM, "aim": AIM, "runs": count}]))
    return int(median >= AIM)


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
