"""`whatwhere.compat.pope_pytorch` against PoPE-pytorch: attention alone, and within BS-RoFormer.

    python benchmarks/pope_pytorch_compat.py

Both sides have the same weights. Outputs and gradients are compared with float64 before anything
is timed: an error of ours beyond twice theirs stops the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import bs_roformer.bs_roformer as host
import PoPE_pytorch as theirs
import torch
import tyro
from torch import Tensor, nn

from interleaved import ratios, rounds, write
from whatwhere.compat import pope_pytorch as ours

PACKAGES = {"PoPE-pytorch": theirs, "whatwhere": ours}
Run = Callable[[], list[Tensor]]

# (B, H, T, D): bands x frames of a second of audio, frames x bands, eight seconds, a small ViT and
# a causal text; the last two are masked as such models mask.
SHAPES = {
    "62 bands, 87 frames": ((62, 8, 87, 64), {}),
    "87 frames, 62 bands": ((87, 8, 62, 64), {}),
    "8 bands, 690 frames": ((8, 8, 690, 64), {}),
    "padded": ((16, 8, 256, 64), {"mask": True}),
    "causal": ((2, 8, 1024, 64), {"causal": True}),
}
AUDIO = {"0.5 s": 22_050, "1 s": 44_100}
STAGES = ("forward", "forward+backward")


def grads(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


def attention(
    shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> dict[str, Run]:
    """For each package, a call that gives the output and the gradients."""
    torch.manual_seed(0)
    batch, heads, length, dim = shape
    # As a projection to queries, keys and values leaves them: heads within the sequence.
    one = torch.randn(batch, length, 3, heads, dim).to(dtype)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in one.unbind(2))
    given = dict(options)
    if given.get("mask"):
        given["mask"] = torch.arange(length) < torch.randint(length // 2, length, (batch, 1))
    bias = -6 * torch.rand(heads, dim)

    def make(package: Any) -> Run:
        module = package.PoPE(dim, heads=heads)
        module.bias.data.copy_(bias)
        module.to(dtype)

        def run() -> list[Tensor]:
            out = package.flash_attn_with_pope(q, k, v, pos_emb=module(length), **given)
            if not torch.is_grad_enabled():
                return [out]
            return grads(out, [q, k, v, module.bias])

        return run

    return {name: make(package) for name, package in PACKAGES.items()}


def separator(samples: int, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Run]:
    """BS-RoFormer on each package; ``state`` holds its weights, or takes those first made."""
    audio = 0.3 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0)).to(dtype)
    taken = {name: getattr(host, name) for name in ("PoPE", "flash_attn_with_pope")}
    made = {}
    for package_name, package in PACKAGES.items():
        functions = {name: getattr(package, name) for name in taken}
        _switch(functions)
        # Of their README's width, one block deep.
        model = host.BSRoformer(
            dim=512, depth=1, time_transformer_depth=1, freq_transformer_depth=1, use_pope=True
        )
        _switch(taken)
        if not state:
            for name, weight in model.named_parameters():
                if name.endswith("pope_embed.bias"):
                    nn.init.uniform_(weight, -6, 0)
            state.update(model.state_dict())
        model.load_state_dict(state)
        made[package_name] = _step(model.to(dtype), functions, audio)
    return made


def _switch(functions: dict[str, Any]) -> None:
    for name, function in functions.items():
        setattr(host, name, function)


def _step(model: nn.Module, functions: dict[str, Any], audio: Tensor) -> Run:
    weights = dict(model.named_parameters())

    def run() -> list[Tensor]:
        _switch(functions)
        torch.set_default_dtype(audio.dtype)  # their window of the STFT has the default one
        try:
            out = model(audio)
        finally:
            torch.set_default_dtype(torch.float32)
        if not torch.is_grad_enabled():
            return [out]
        found = torch.autograd.grad(out.square().sum(), list(weights.values()), allow_unused=True)
        each = dict(zip(weights, found, strict=True))
        # Not one by one: gradients of some are nothing but rounding.
        phases = [g.flatten() for name, g in each.items() if name.endswith("pope_embed.bias")]
        return [out, torch.cat(phases), torch.cat([g.flatten() for g in found if g is not None])]

    return run


def errors(single: dict[str, Run], double: dict[str, Run]) -> dict[str, float]:
    """Largest error of an output or a gradient, relative to the largest of it in float64.

    Raises:
        SystemExit: If ours is more than twice as far off as theirs.
    """
    wanted = [x.detach() for x in double["PoPE-pytorch"]()]
    found = {}
    for name, run in single.items():
        found[name] = max(
            float((a.detach() - b).abs().max() / b.abs().max())
            for a, b in zip(run(), wanted, strict=True)
        )
    few = 16 * torch.finfo(torch.float32).eps
    if found["whatwhere"] > 2 * found["PoPE-pytorch"] + few:
        raise SystemExit(f"ours is off by more than theirs: {found}; nothing was timed")
    return found


def measure(sides: dict[str, Run], stage: str, count: int) -> dict[str, tuple[float, float]]:
    """Median and least of the ratios to theirs."""

    def timed(run: Run) -> Callable[[], None]:
        def call() -> None:
            with torch.set_grad_enabled(stage != "forward"):
                run()

        return call

    taken = rounds({name: timed(run) for name, run in sides.items()}, count)
    return ratios(taken, to="PoPE-pytorch")


def main(threads: tuple[int, ...] = (1,), count: int = 9) -> None:
    """Measure and write results/pope_pytorch_compat.csv."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    cases: dict[str, Callable[[torch.dtype], dict[str, Run]]] = {}
    for what, (shape, options) in SHAPES.items():
        label = f"attention {'x'.join(map(str, shape))}, {what}"
        cases[label] = lambda dtype, s=shape, o=options: attention(s, o, dtype)
    for what, samples in AUDIO.items():
        cases[f"BSRoformer 512 wide, {what}"] = lambda dtype, n=samples: separator(n, state, dtype)
    packages = ("PoPE-pytorch", "BS-RoFormer")
    rows: list[dict[str, Any]] = []
    for label, make in cases.items():
        sides = make(torch.float32)
        wrong = errors(sides, make(torch.float64))
        for used in threads:
            torch.set_num_threads(used)
            for stage in STAGES:
                median, least = measure(sides, stage, count)["whatwhere"]
                rows.append(
                    {
                        "case": label,
                        "threads": used,
                        "pass": stage,
                        "whatwhere / PoPE-pytorch": f"{median:.3f}",
                        "least": f"{least:.3f}",
                        "error": f"{wrong['whatwhere']:.1e}",
                        "their error": f"{wrong['PoPE-pytorch']:.1e}",
                        "load": f"{os.getloadavg()[0]:.1f}",
                        **{package: version(package) for package in packages},
                    }
                )
                print(*list(rows[-1].values())[:-2], sep="\t", flush=True)
    print(write("pope_pytorch_compat", rows))


if __name__ == "__main__":
    tyro.cli(main)
