"""What the site has beyond the pages in docs/.

Pages link to files of the repository by relative paths, which a code host follows. The site gets
those files under the paths they have in the repository (docs/ being its root), and links are
turned to them; so the same link works in both places.
"""

from __future__ import annotations

import html as markup
import json
import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "LOG.md")
"""Pages that lie at the root of the repository."""

LINK = re.compile(r"(?P<head>\]\()(?P<target>[^()#\s]+)(?P<rest>(?:#[^()\s]*)?\))")
HREF = re.compile(r"(?P<head><a\b[^>]*?\shref=\")(?P<target>[^\"#]+)(?P<rest>(?:#[^\"]*)?\")")
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed|object|link)\b[^>]*?"
    r"\s(?:src|srcset|data|href)=[\"']?(?:https?:)?//[^>]*>",
    re.IGNORECASE,
)
NO_ALT = 'alt="No description has been provided for this image"'
"""What nbconvert writes for every image of a notebook."""
# A warning of any plugin counts under --strict, if it goes through MkDocs' own logger.
log = logging.getLogger("mkdocs.hooks.whatwhere")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages at the root, and the files outside of docs/ that pages link to."""
    for name in PAGES:
        files.append(_from_repository(name, config))
    for file in list(files.documentation_pages()):
        text = Path(str(file.abs_src_path)).read_text(encoding="utf-8")
        for match in LINK.finditer(text):
            target = _repository_path(match["target"], file.src_uri)
            if target is None or target.startswith(DOCS) or files.get_file_from_path(target):
                continue
            if (ROOT / target).is_file():
                files.append(_from_repository(target, config))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between docs/ and the rest of the repository to the site's paths."""

    def turned(match: re.Match[str]) -> str:
        target = _repository_path(match["target"], page.file.src_uri)
        if target is None:
            return match[0]
        place = posixpath.dirname(page.file.src_uri)
        return match["head"] + posixpath.relpath(_site_path(target), place) + match["rest"]

    return LINK.sub(turned, markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a notebook, which comes here as HTML, and describe its images.

    MkDocs turns those of Markdown.
    """
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def turned(match: re.Match[str]) -> str:
        target = _repository_path(match["target"], page.file.src_uri)
        if target is None:
            return match[0]
        file = files.get_file_from_path(_site_path(target))
        if file is None:
            log.warning("%s links to %s, which is not there", page.file.src_uri, match["target"])
            return match[0]
        return match["head"] + file.url_relative_to(page.file) + match["rest"]

    return _described(HREF.sub(turned, html), page.file)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Warn, which ends a strict build, of a page that would fetch something from elsewhere."""
    for found in FETCHED.findall(output):
        if 'rel="canonical"' not in found:
            log.warning("%s fetches from another host: %s", page.file.src_uri, found[:200])
    return output


def _described(html: str, file: File) -> str:
    """Give each image of a notebook the ``alt`` in the metadata of the cell that made it."""
    notebook = json.loads(Path(str(file.abs_src_path)).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                said = cell["metadata"].get("alt", "")
                html = html.replace(NO_ALT, f'alt="{markup.escape(said)}"', 1)
    if NO_ALT in html or 'alt=""' in html:
        log.warning("%s has an image without a description (alt)", file.src_uri)
    return html


def _from_repository(path: str, config: MkDocsConfig) -> File:
    return File.generated(config, path, abs_src_path=str(ROOT / path))


def _site_path(path: str) -> str:
    return path.removeprefix(DOCS)


def _repository_path(target: str, page: str) -> str | None:
    """Where a link leads, from the root of the repository; `None` if to another host."""
    if "://" in target or target.startswith(("mailto:", "/")):
        return None
    source = page if page in PAGES else DOCS + page
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
