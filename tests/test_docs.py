"""README, docs and cards name what is there: modules that run, files that links lead to, recipes."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/*.*", "model_cards/*.md", "performance/*.md", "training/**/*.yaml", "Makefile", ".ci/run")
PAGES = [path for pattern in PATTERNS for path in ROOT.glob(pattern)]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES if path.suffix != ".png"}


@pytest.mark.parametrize("page", TEXTS)
def test_modules_that_are_named_can_be_run(page):
    for module in set(re.findall(r"(?:python3?|launch|torchrun) .*?-m ([a-z_]+(?:\.[a-z_]+)*)", TEXTS[page])):
        if module not in ("pip", "pytest", "venv"):
            spec = find_spec(module)
            assert spec is not None, module
            runs = find_spec(f"{module}.__main__") if spec.submodule_search_locations else spec
            assert runs is not None and "__main__" in Path(runs.origin).read_text() + Path(runs.origin).name, module


@pytest.mark.parametrize(
    "page", [name for name in TEXTS if name.endswith(".md") and not name.startswith("model_cards")]
)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", TEXTS[page]):
        assert "{{" in target or (ROOT / page).parent.joinpath(target).exists(), target


def test_files_that_are_named_exist():
    tops = "modeling_mammodino|dataset_scripts|training|performance|tests|docs|model_cards"
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/corpus.md",
        "docs/evaluation.md",
        "docs/pretraining.md",
        ".ci/run",
    ):
        for path in set(re.findall(rf"(?<![\w./])((?:{tops})/[\w./-]*\w)", TEXTS[page])):
            assert (ROOT / path).exists(), f"{page}: {path}"


def test_every_recipe_is_in_the_readme():
    for recipe in (ROOT / "training" / "recipes").glob("*.yaml"):
        assert f"`{recipe.stem}`" in TEXTS["README.md"]
