"""A hook of mkdocs: the pages that the code makes, and what pages link to outside docs/, become part of the site."""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
MADE = ROOT / "build/reference"  # by docs/reference.py
MORE = ("*.md", "LICENSE", "shards/README.md", "examples/**/*.py", "benchmarks/*.md", "pipeline/sources/findings.csv")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures of other folders."""
    for path in sorted(path for pattern in MORE for path in ROOT.glob(pattern)):
        name = str(path.relative_to(ROOT))
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in sorted(MADE.glob("*.md")):
        files.append(File(path.name, str(MADE), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let each link lead to where its file is in the site."""
    source = Path(page.file.abs_src_path).parent
    here = PurePosixPath(page.file.src_uri).parent

    def move(match: re.Match[str]) -> str:
        target, mark, anchor = match[1].partition("#")
        if not target or "://" in target:
            return match[0]
        path = Path(os.path.relpath(source / target, ROOT))
        inside = path.relative_to("docs") if path.parts[0] == "docs" else path
        return f"]({os.path.relpath(inside, here)}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", move, markdown)
