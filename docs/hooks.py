"""What the site has beside docs/: pages that live elsewhere in the repository, and the notebooks as pages.

Links are written for the repository and turned here into those of the site; of those to what the site has not,
only the text is left.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {  # of the site, and of the repository
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "performance.md": "performance/README.md",
    "mammodino-small.md": "model_cards/mammodino-small/README.md",
    "seen.png": "model_cards/mammodino-small/seen.png",
    "pretraining.png": "model_cards/mammodino-small/pretraining.png",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/; a notebook's page shows its cells, without what they print."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        content = notebook_page(Path(str(notebook.abs_src_path)))
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page into those of the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(PAGES.get(here, f"docs/{here}"))
    moved = {source: target for target, source in PAGES.items()}

    def link(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups(default="")
        place = posixpath.normpath(posixpath.join(folder, target))
        uri = moved.get(place, place.removeprefix("docs/") if place.startswith("docs/") else "")
        if uri.endswith(".ipynb") and text != "notebook":
            uri = uri.replace(".ipynb", ".md")
        if not uri:
            return text
        return f"{image}[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor})"

    return LINK.sub(link, markdown)


def notebook_page(path: Path) -> str:
    """Return a notebook's cells as Markdown, with a link to the file itself."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        language, code = (
            ("bash", source.removeprefix("%%bash\n")) if source.startswith("%%bash") else ("python", source)
        )
        parts.append(f"```{language}\n{code}\n```" if cell["cell_type"] == "code" else source)
    title, *rest = parts
    return "\n\n".join([title, f"The page shows the cells; [notebook]({path.name}) to run it.", *rest])
