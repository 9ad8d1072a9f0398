"""Pages of the site that lie at the top of the repository; mkdocs calls this while it builds."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

TOP_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Return the site's files with `TOP_PAGES` among them."""
    root = Path(config.config_file_path).parent
    for page, source in TOP_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / source)))
    return files
