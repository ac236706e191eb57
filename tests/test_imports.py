"""`import whatwhere` brings torch and nothing else; layers import in one direction."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import whatwhere

PACKAGE = Path(whatwhere.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each layer may import of ours; the root holds the public names of the first three.
CORE = {"spec", "encodings", "attention"}
MAY = {
    "": CORE,
    "spec": set(),
    "encodings": {"spec"},
    "attention": {"spec"},
    "compat": CORE,
    "models": CORE | {""},
    "figures": set(),
    "analysis": CORE | {"", "models", "figures"},
    "lab": CORE | {"", "models", "figures", "analysis"},
    "cli": CORE | {"", "models", "analysis", "lab"},
    "__main__": {"cli"},
}
# What each layer may import of others'; None is anything.
OTHERS = {
    "": {"torch"},
    "spec": {"torch"},
    "encodings": {"torch"},
    "attention": {"torch"},
    "models": {"huggingface_hub", "safetensors", "torch", "transformers"},
    "compat": {"torch"},
    "figures": {"matplotlib", "numpy"},
    "analysis": None,
    "lab": None,
    "cli": None,
    "__main__": set(),
}


def module_of(path: Path) -> str:
    """The dotted name of a file inside the package, "" for the root."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> str:
    return module.partition(".")[0]


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in it."""
    here = ["whatwhere", *module_of(path).split(".")]
    if path.name != "__init__.py":
        here = here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join([*here[: len(here) - node.level + 1], node.module or ""]).strip(".")
            source = start if node.level else str(node.module)
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """Modules of the package that a file imports, without the package's name."""
    known = {module_of(other) for other in FILES}
    found = set()
    for name in imported(path):
        if name.split(".")[0] == "whatwhere":
            inside = name.removeprefix("whatwhere").strip(".")
            while inside not in known:
                inside = inside.rpartition(".")[0]
            found.add(inside)
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_layers_import_in_one_direction(path: Path) -> None:
    own = layer(module_of(path))
    assert own in MAY, f"{own} is no layer of the table: say what it may import"
    for module in ours(path):
        assert layer(module) in MAY[own] | {own}, f"{name_of(path)} imports {module or 'the root'}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_layers_import_what_is_theirs_of_others(path: Path) -> None:
    allowed = OTHERS[layer(module_of(path))]
    if allowed is None:
        return
    if path.is_relative_to(PACKAGE / "attention" / "triton"):
        allowed = allowed | {"triton"}
    tops = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
    assert tops - {"whatwhere"} <= allowed


def backends() -> dict[str, str]:
    """Home of each backend, by name: the file, or the folder, that makes its `run`."""
    return {
        name: ".".join(backend.run.__module__.removeprefix("whatwhere.").split(".")[:2])
        for name, backend in whatwhere.BACKENDS.items()
    }


def test_backends_never_import_one_another() -> None:
    homes = set(backends().values())
    for home in homes:
        path = PACKAGE / Path(*home.split("."))
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            others = {other for other in homes if other != home}
            reached = {o for module in ours(file) for o in others if module.startswith(o)}
            assert not reached, f"{name_of(file)} imports {reached}"
            assert "attention.api" not in ours(file)


def test_what_backends_share_does_not_know_them() -> None:
    homes = set(backends().values())
    for path in (PACKAGE / "attention").glob("*.py"):
        if module_of(path) not in homes | {"attention", "attention.api"}:
            assert not homes & ours(path), name_of(path)


@cache
def modules_after(statement: str) -> set[str]:
    """Top-level modules of a fresh process after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout)}


def test_import_brings_nothing_that_torch_did_not() -> None:
    new = modules_after("import torch, whatwhere") - modules_after("import torch")
    new -= sys.stdlib_module_names
    assert {name for name in new if not name.startswith("_")} == {"whatwhere"}


def test_compat_is_imported_by_name_alone_and_brings_nothing() -> None:
    loaded = "import sys, whatwhere; assert 'whatwhere.compat' not in sys.modules"
    peer = "import whatwhere.compat.pope_pytorch"
    assert modules_after(peer) == modules_after(loaded)


OPTIONAL = {
    *("transformers", "safetensors", "accelerate", "triton", "matplotlib", "pandas", "yaml"),
    *("pydantic", "tyro", "rich", "jinja2", "tensorboard", "x_transformers", "PoPE_pytorch"),
}


def test_no_call_brings_an_optional_package() -> None:
    """Nor may the first call of each function, or making any encoding."""
    call = (
        "import torch, whatwhere as ww\n"
        "for name in ww.ENCODINGS:\n"
        "    more = {'factor': 2.0} if name == 'yarn' else {}\n"
        "    e = ww.make(name, head_dim=8, num_heads=2, train_length=128, **more)\n"
        "    q = torch.randn(1, 2, 4, 8)\n"
        "    ww.attention(q, q, q, e(), causal=True)\n"
        "    ww.table_bytes(e, 7), ww.explain(q, q, q, e())"
    )
    # PyTorch's own compiler, which torch.compiler's questions load, looks for Triton.
    assert not (modules_after(call) - modules_after("import torch, torch._dynamo")) & OPTIONAL


def test_public_names_exist_and_are_all_there_is() -> None:
    for name in whatwhere.__all__:
        assert hasattr(whatwhere, name), name
    assert list(whatwhere.__all__) == sorted(whatwhere.__all__, key=lambda n: (not n.isupper(), n))
    wanted = {
        *("PoPE", "PoPEID", "RoPE", "RoPEID", "YaRN", "NoPE", "ALiBi", "Sinusoidal", "Learned"),
        *("ENCODINGS", "BACKENDS", "make", "ScoreSpec", "attention", "scores", "explain"),
        *("UnsupportedError", "table_bytes", "grid", "encode_queries", "encode_keys"),
    }
    assert wanted <= set(whatwhere.__all__)
