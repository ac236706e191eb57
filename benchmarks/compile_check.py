"""Compile every kernel for devices that are not there, and hold it to what was recorded.

    python benchmarks/compile_check.py            # compare with results/kernels.csv
    python benchmarks/compile_check.py --update   # write it anew, on purpose

Triton brings ptxas and nvdisasm, so that registers, spills, shared memory and the instructions of
a kernel are known without a GPU. Fails where a kernel spills, has no tensor-core instruction for
16-bit numbers, wants more shared memory than a device has, or differs from the record.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import whatwhere as ww
from whatwhere.attention.call import prepare
from whatwhere.attention.triton import arguments as call_arguments
from whatwhere.attention.triton import launch, shapes
from whatwhere.attention.triton.problem import Problem, Score

RECORD = Path(__file__).parent / "results" / "kernels.csv"
# Shared memory that a block may have, bytes (CUDA programming guide, compute capabilities).
ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA", "HMMA", "TCGEN05")}
KEY = ("case", "kernel", "architecture")
CORE = ("pope-64", "pope-128", "rope-64")
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Case:
    """One way to call attention."""

    name: str
    encoding: str
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 2
    options: tuple[tuple[str, Any], ...] = ()
    call: tuple[str, ...] = ("causal",)
    length: int = 512
    value_dim: int | None = None


CASES = (
    Case("pope-128-fp32", "pope", 128, torch.float32),
    Case("pope-64", "pope", 64),
    Case("pope-128", "pope", 128),
    Case("pope-64-full", "pope", 64, call=()),
    Case("pope-64-fp16", "pope", 64, torch.float16),
    Case("pope-64-fp32", "pope", 64, torch.float32),
    Case("pope-half-128", "pope", 128, options=(("fraction", 0.5),)),
    Case("pope-64-grouped", "pope", 64, kv_heads=1),
    Case("pope-128-grouped", "pope", 128, kv_heads=1),
    Case("pope-64-packed", "pope", 64, call=("causal", "segments")),
    Case("pope-64-window", "pope", 64, call=("causal", "window")),
    Case("pope-64-masked", "pope", 64, call=("causal", "positions", "mask")),
    Case("pope-256", "pope", 256),
    Case("rope-64", "rope", 64),
    Case("rope-128", "rope", 128),
    Case("rope-id-128", "rope-id", 128, options=(("train_length", 256),)),
    Case("alibi-64", "alibi", 64),
    Case("encoded-256-128", "nope", 256, value_dim=128),
)


@dataclass
class Launch:
    """A kernel and what it was called with."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    warps: int
    stages: int


def recorded(run: Callable[[], Any]) -> list[Launch]:
    """The kernels that a call would launch, none of them run."""
    found: list[Launch] = []

    def note(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        warps, stages = kwargs.pop("num_warps", 4), kwargs.pop("num_stages", 3)
        bound = self.signature.bind(*args, **kwargs)
        found.append(Launch(self, dict(bound.arguments), warps, stages))

    with mock.patch.object(JITFunction, "run", note):
        run()
    return found


def launches(case: Case, capability: int) -> list[Launch]:
    """What forward, backward and decoding launch for a case."""
    heads = 2
    encoding = ww.make(
        case.encoding, head_dim=case.head_dim, num_heads=heads, **dict(case.options)
    )
    shape = (1, case.length, heads, case.head_dim)
    q = torch.zeros(shape, dtype=case.dtype).transpose(1, 2)
    k = torch.zeros(1, case.length, case.kv_heads, case.head_dim, dtype=case.dtype).transpose(1, 2)
    wide = case.value_dim or case.head_dim
    v = torch.zeros(1, case.length, case.kv_heads, wide, dtype=case.dtype).transpose(1, 2)
    at = torch.arange(case.length)[None]
    given = {
        "segments": at // 100 if "segments" in case.call else None,
        "key_mask": at >= 0 if "mask" in case.call else None,
        "window": 100 if "window" in case.call else None,
        "query_positions": at if "positions" in case.call else None,
        "key_positions": at if "positions" in case.call else None,
    }
    call = prepare(q, k, v, encoding(), "causal" in case.call, **given)
    arguments = call_arguments.of(call)
    with mock.patch.object(shapes, "_capability", lambda device: capability):
        problem = Problem(q, k, wide, k.shape[2], Score(*arguments))
        out = torch.zeros(1, heads, case.length, wide, dtype=case.dtype)
        lse = torch.zeros(1, heads, case.length)
        found = recorded(lambda: launch.run_forward(problem, q, k, v))
        found += recorded(lambda: launch.run_backward(problem, out, q, k, v, out, lse))
        if case.name == "pope-64":
            wide_grad = torch.zeros(1, heads, case.length, 2 * case.head_dim, dtype=case.dtype)
            found += recorded(lambda: launch.run_widen(q, problem))
            found += recorded(lambda: launch.run_narrow(wide_grad, q, problem))
        if given["segments"] is None:
            one = prepare(
                q[:, :, -1:],
                k,
                v,
                encoding(),
                "causal" in case.call,
                **{
                    **given,
                    "query_positions": None if given["query_positions"] is None else at[:, -1:],
                },
            )
            last = q[:, :, -1:]
            few = Problem(last, k, wide, k.shape[2], Score(*call_arguments.of(one)))
            found += recorded(lambda: launch.run_decode(few, last, k, v))
    return found


def compiled(found: Launch, capability: int) -> Any:
    """Compile as a launch on that device would: ones are constants, 16s are divisible."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(found.kernel.params):
        value = found.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (value is True or value is False):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        elif value == 1:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = 1
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=found.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": found.warps, "num_stages": found.stages},
    )


def resources(binary: Any) -> dict[str, int]:
    """Registers, spills, shared bytes and tensor-core instructions of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", path)
        listing = _output(tools / "nvdisasm", "-c", path)
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", listing, re.M)
    short = [name.split(".")[0] for name in names]
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found.group(1)),
        "spills": sum(name in ("STL", "LDL") for name in short),
        "shared": int(binary.metadata.shared),
        "instructions": len(names),
        "tensor cores": sum(name in sum(TENSOR_CORES.values(), ()) for name in short),
        "mma.sync": short.count("HMMA"),
    }


def _output(*command: Any) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


def check_case(case: Case, capability: int) -> list[dict[str, Any]]:
    """One row for each kernel of a case."""
    rows: list[dict[str, Any]] = []
    done: set[str] = set()
    torch.set_num_threads(1)
    for found in launches(case, capability):
        name = found.kernel.fn.__name__.removesuffix("_kernel")
        if name in ("table", "merge", "magnitude") and case.name != "pope-64":
            continue
        if name in done:
            continue
        done.add(name)
        shape = "x".join(str(found.arguments[n]) for n in ("BM", "BN") if n in found.arguments)
        rows.append(
            {
                "case": case.name,
                "kernel": name,
                "architecture": f"sm_{capability}",
                "block": shape,
                "warps": found.warps,
                "stages": found.stages,
                **resources(compiled(found, capability)),
                "triton": triton.__version__,
            }
        )
    return rows


def strict(case: Case) -> bool:
    """Whether a case must not spill at all.

    The accumulators of wider heads fill the registers of a multiprocessor by themselves: what
    they spill is on record, and may not change unseen.
    """
    return case.head_dim <= (128 if case.dtype.itemsize == 2 else 64)


def faults(row: dict[str, Any], case: Case) -> Iterator[str]:
    """What is wrong with a kernel, whatever was recorded."""
    capability = int(row["architecture"][3:])
    if row["spills"] and strict(case):
        yield f"{row['spills']} instructions spill registers"
    if row["shared"] > ARCHITECTURES[capability]:
        yield f"wants {row['shared']} bytes of shared memory, has {ARCHITECTURES[capability]}"
    products = row["kernel"] in ("forward", "backward_queries", "backward_keys", "decode")
    if not products or case.dtype == torch.float32:
        return
    if not row["tensor cores"]:
        # A tile too large for tensor memory becomes a stub, without a word.
        yield "has no tensor-core instruction"
    # Few queries fill no more than Ampere's tiles.
    if capability == 90 and row["mma.sync"] and row["kernel"] != "decode" and strict(case):
        yield "uses HMMA, Ampere's instruction, in place of HGMMA"


def recorded_rows() -> dict[tuple[str, ...], dict[str, str]]:
    """The record, by what was compiled."""
    if not RECORD.exists():
        return {}
    with RECORD.open(newline="", encoding="utf-8") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def write(rows: list[dict[str, Any]]) -> None:
    """Replace the record whole."""
    temporary = RECORD.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(RECORD)


def jobs(given: argparse.Namespace) -> list[tuple[Case, int]]:
    """Cases times architectures; in brief, those that are not tuned for with fewer cases."""
    found = []
    for case in CASES:
        if given.cases and case.name not in given.cases:
            continue
        for capability in given.sm:
            if given.brief and (
                case.head_dim > 128 or (capability != 90 and case.name not in CORE)
            ):
                continue
            found.append((case, capability))
    return found


def main() -> int:
    """Compile, compare, report."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the record anew")
    parser.add_argument("--brief", action="store_true", help="what every change is held to")
    parser.add_argument("--cases", nargs="*", help="names of cases; all by default")
    parser.add_argument("--sm", nargs="*", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    if given.update and (given.brief or given.cases or given.sm != list(ARCHITECTURES)):
        parser.error("--update writes the whole record: name no cases")
    record = recorded_rows()
    todo, rows, bad = jobs(given), [], 0
    with ProcessPoolExecutor(given.workers) as pool:
        results = pool.map(check_case, *zip(*todo, strict=True))
        for (case, _), found in zip(todo, results, strict=True):
            for row in found:
                wrong = list(faults(row, case))
                if not given.update:
                    wrong += differences(row, record)
                bad += len(wrong)
                rows.append(row)
                print(*row.values(), *wrong, sep="\t", flush=True)
    if given.update:
        write(rows)
        print(RECORD)
    elif bad:
        print("if this was meant: benchmarks/compile_check.py --update", file=sys.stderr)
    return int(bad > 0)


def differences(row: dict[str, Any], record: dict[tuple[str, ...], dict[str, str]]) -> list[str]:
    """What is not as recorded, if the record was made by the same compiler."""
    known = record.get(tuple(row[name] for name in KEY))
    if known is None:
        return ["is not on record"]
    if known["triton"] != row["triton"]:
        return []
    return [
        f"{name} {row[name]}, on record {known[name]}"
        for name in ("block", "warps", "stages", "registers", "spills", "shared")
        if str(row[name]) != known[name]
    ]


if __name__ == "__main__":
    sys.exit(main())
