"""A hook of mkdocs: pages that lie at the repository's root become pages of the site.

Links are written for whoever reads the repository. In the site, those that lead to files which are no pages
(sources, examples) become plain text; those to pages go on to work, and broken ones still break the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {name: name.lower() for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root."""
    for name, page in PAGES.items():
        if (ROOT / name).is_file():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links as they are in the repository into links of the site."""
    own = page.file.src_uri
    here = next((name for name, uri in PAGES.items() if uri == own), f"docs/{own}")

    def rewrite(link: re.Match[str]) -> str:
        words, target, anchor = link[1], link[2], link[3] or ""
        if ":" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        inside = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if inside is None:
            return words if (ROOT / path).exists() else link[0]
        return f"[{words}]({posixpath.relpath(inside, posixpath.dirname(own) or '.')}{anchor})"

    return _LINK.sub(rewrite, markdown)
