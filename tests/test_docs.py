"""Pages lead where they say, and state what was measured."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import whatwhere as ww
from whatwhere.analysis import plots
from whatwhere.lab.results import rows, store
from whatwhere.models import WhatWhereConfig, WhatWhereForCausalLM

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
AT_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md", "LOG.md", "README.md")
ROW = re.compile(r"\[(?P<stated>[^\]]+)\]\(rows\.md#(?P<anchor>[^)]+)\)")
LINK = re.compile(r"\]\((?P<target>[^()#\s]*)(?:#(?P<anchor>[^()\s]*))?\)")
FENCE = re.compile(r"^```.*?^```", flags=re.M | re.S)


def pages() -> list[Path]:
    return [*sorted(DOCS.rglob("*.md")), *sorted(DOCS.rglob("*.ipynb"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def text_of(path: Path) -> str:
    """A page's Markdown without its blocks of code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return FENCE.sub("", text)


@cache
def anchors_of(path: Path) -> frozenset[str]:
    """Anchors that exist both in the site and on a code host, which write headings differently."""
    heads = re.findall(r"^#{1,6} +(.+?) *$", text_of(path), flags=re.M)
    words = [re.sub(r"[^\w\s-]", "", head.replace("`", "").lower()).strip() for head in heads]
    in_site = {re.sub(r"[-\s]+", "-", word) for word in words}
    on_host = {word.replace(" ", "-") for word in words}
    return frozenset((in_site & on_host) | set(re.findall(r'<a id="([^"]+)">', text_of(path))))


@cache
def config() -> Any:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def menu(entry: Any) -> list[str]:
    """The pages of a part of the menu."""
    if isinstance(entry, str):
        return [entry]
    parts = entry if isinstance(entry, list) else entry.values()
    return [page for part in parts for page in menu(part)]


@cache
def rows_of_page() -> dict[str, list[str]]:
    """Anchor -> cells of docs/rows.md."""
    found = re.findall(r'^\| <a id="([^"]+)"></a>(.*) \|$', text_of(DOCS / "rows.md"), flags=re.M)
    assert len({anchor for anchor, _ in found}) == len(found), "two rows have one anchor"
    return {anchor: [cell.strip() for cell in cells.split("|")] for anchor, cells in found}


def numbers(cells: list[str]) -> list[float]:
    """What a row's cells say, spreads and separators of thousands aside."""
    plain = (cell.partition(" ±")[0].replace(",", "") for cell in cells)
    return [float(cell) for cell in plain if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", cell)]


def agrees(stated: str, value: float) -> bool:
    """Whether a figure as a page states it is a value, rounded to the digits that are stated."""
    share = stated.endswith("%")
    digits = stated.replace("\N{NO-BREAK SPACE}", "").rstrip("%").strip().replace(",", "")
    places = len(digits.partition(".")[2])
    return abs(float(digits) - (100 if share else 1) * value) <= 0.5 * 10**-places + 1e-9


# What a page states


@pytest.mark.parametrize(
    "page", [page for page in pages() if ROW.search(text_of(page))], ids=name_of
)
def test_figures_are_those_of_the_rows_they_link_to(page: Path) -> None:
    for match in ROW.finditer(text_of(page)):
        stated, anchor = match["stated"], match["anchor"]
        assert anchor in rows_of_page(), f"{page.name}: no row {anchor}"
        if not stated[0].isdigit():
            continue
        found = numbers(rows_of_page()[anchor])
        assert any(agrees(stated, value) for value in found), (
            f"{page.name} states {stated!r}, row {anchor} has {found}"
        )


def test_measured_figures_of_the_choice_are_those_of_results_csv() -> None:
    table = store.load(ROOT / store.DEFAULT)
    means = {
        rows.anchor(*map(str, key)): values.mean()
        for key, values in table.groupby(
            ["recipe", "preset", "encoding", "metric", "length"], sort=False
        )["value"]
    }
    checked = [
        (match["anchor"], agrees(match["stated"], means[match["anchor"]]))
        for match in ROW.finditer(text_of(DOCS / "choose.md"))
        if match["anchor"] in means
    ]
    assert len(checked) >= 50
    assert not [anchor for anchor, same in checked if not same]


def test_a_figure_that_moved_is_found() -> None:
    assert agrees("1.881", 1.8809) and agrees("30.83\N{NO-BREAK SPACE}%", 0.3083)
    assert agrees("2,048", 2048.0) and agrees("1.10", 1.097)
    assert not agrees("1.881", 1.8816) and not agrees("30.83 %", 0.3082) and not agrees("1.1", 1.2)


def test_every_claim_of_the_choice_has_a_row() -> None:
    known, _, unknown = text_of(DOCS / "choose.md").partition("## What is not known")
    assert unknown
    claims = re.findall(r"^(?:- |\| )(?!You|Your|---)(?:.+\n?)(?:^  .+\n?)*", known, flags=re.M)
    assert len(claims) >= 25
    assert not [claim for claim in claims if not ROW.search(claim)]
    stated = ROW.sub("", known)
    assert not re.findall(r"\d+\.\d+", stated), "a figure without a row"


# Where links lead


@pytest.mark.parametrize("page", [*pages(), *(ROOT / name for name in AT_ROOT)], ids=name_of)
def test_links_lead_to_files_and_anchors_that_exist(page: Path) -> None:
    for match in LINK.finditer(text_of(page)):
        target, anchor = match["target"], match["anchor"]
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        assert file.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name} links to {target}#{anchor}"


def test_every_page_is_in_the_menu_once() -> None:
    excluded = [
        line for line in config().get("exclude_docs", "").split("\n") if not line.startswith("#")
    ]
    there = {page.relative_to(DOCS).as_posix() for page in pages()}
    there = {page for page in there if not any(fnmatch(page, line) for line in excluded if line)}
    listed = menu(config()["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) == there | {name for name in AT_ROOT if name != "README.md"}
    # A notebook and a page of one name would be written to one file.
    stems = [str(Path(page).with_suffix("")) for page in listed]
    assert len(stems) == len(set(stems))


# What the reference names


def reference() -> dict[str, list[str]]:
    """Module -> the members that a page of the reference lists."""
    found: dict[str, list[str]] = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        parts = re.split(r"^::: ", page.read_text(encoding="utf-8"), flags=re.M)[1:]
        for part in parts:
            listed = re.search(r"^      members: \[(.*)\]$", part, flags=re.M)
            found[part.split("\n")[0]] = listed[1].split(", ") if listed else []
    return found


def test_the_reference_names_what_there_is() -> None:
    for module, members in reference().items():
        if importlib.util.find_spec(module) is None:
            assert module == "whatwhere.analysis", f"no module {module}"
            continue
        missing = [name for name in members if not hasattr(importlib.import_module(module), name)]
        assert not missing, f"{module} has no {missing}"


def test_every_public_name_is_in_the_reference() -> None:
    known = reference()
    listed = {name for members in known.values() for name in members}
    assert set(ww.__all__) <= listed
    assert set(ww.models.__all__) <= set(known["whatwhere.models"])
    assert set(plots.__all__) == set(known["whatwhere.analysis.plots"])
    # A page takes a function for the module whose name it has, unless that is asked for.
    for name in ww.analysis.__all__:
        module = f"whatwhere.analysis.{name}"
        assert importlib.util.find_spec(module) is None or name in known[module]


# What can be run


@pytest.mark.parametrize("name", ["index", "concepts", "choose"])
def test_python_on_the_page_runs(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S):
        exec(compile(block, f"{name}.md", "exec"), {})


def test_python_on_the_page_of_diagnosis_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny(_: str) -> LlamaForCausalLM:
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        config = LlamaConfig(
            vocab_size=49152, num_hidden_layers=1, max_position_embeddings=512, **shape
        )
        return LlamaForCausalLM(config)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tiny)
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "diagnose.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S):
        exec(compile(block, "diagnose.md", "exec"), {})
    assert (tmp_path / "geometry.pdf").stat().st_size


def test_code_of_the_notebook_runs_and_its_outputs_are_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notebook = json.loads((DOCS / "diagnose_notebook.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "stream"}
    drawn = [c for c in cells if any("image/png" in o.get("data", {}) for o in c["outputs"])]
    assert drawn and all(cell["metadata"].get("alt") for cell in drawn)

    def tiny(folder: Path) -> WhatWhereForCausalLM:
        config = WhatWhereConfig(
            vocab_size=256,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=128,
            position_encoding=folder.parent.name.removesuffix("-seed0"),
        )
        return WhatWhereForCausalLM(config).eval()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tiny)
    monkeypatch.setattr(logging, "disable_progress_bar", lambda: None)
    names: dict[str, Any] = {}
    for cell in cells:
        lines = [line for line in cell["source"] if not line.startswith("%")]
        exec(compile("".join(lines), "notebook", "exec"), names)
        shown = "".join("".join(o.get("data", {}).get("text/plain", "")) for o in cell["outputs"])
        if "input_ids" in names:  # one text will do
            names["input_ids"] = names["input_ids"][:1]
        if "AttentionLayer" in shown:  # what the cell's last line gives now
            layer = repr(names["traces"]["pope"].layers[0])
            assert re.findall(r"(\w+)=", shown) == re.findall(r"(\w+)=", layer)


def test_the_script_makes_the_figures_of_concepts(tmp_path: Path) -> None:
    shown = set(re.findall(r"\(figures/(\w+)\.svg\)", text_of(DOCS / "concepts.md")))
    done = subprocess.run(
        [sys.executable, str(DOCS / "figures" / "concepts.py"), "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.stem for path in tmp_path.iterdir()} == shown
    assert {path.stem for path in (DOCS / "figures").glob("*.svg")} == shown


def test_a_strict_build_fails_on_what_leads_nowhere(tmp_path: Path) -> None:
    """Else `make docs` could pass whatever stands on the pages."""
    pytest.importorskip("mkdocs", reason="the site's builder is not installed: make docs does")
    for name in ("docs", "src", "results", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in (*AT_ROOT, "mkdocs.yml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    faults = {
        "docs/index.md": "[a](nowhere.md) [b](choose.md#nobody)",
        "docs/concepts.md": '<img src="https://example.org/a.png">',
        "docs/orphan.md": "# In no menu",
        "src/whatwhere/encodings/frequencies.py": (
            'def odd(a: int) -> None:\n    """Odd.\n\n    Args:\n        b: No such.\n    """'
        ),
    }
    for name, fault in faults.items():
        page = tmp_path / name
        page.write_text((page.read_text() if page.exists() else "") + "\n\n" + fault + "\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", "built"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    for told in ("nowhere.md", "#nobody", "https://example.org/a.png", "orphan.md", "'b'"):
        assert told in said, said[-3000:]
