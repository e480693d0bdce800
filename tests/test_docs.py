"""README, docs and cards name what is there: modules that run, their options, files that links lead to, recipes."""

import argparse
import json
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/*.*", "model_cards/*.md", "performance/*.md", "training/**/*.yaml", "Makefile", ".ci/run")
PAGES = [path for pattern in PATTERNS for path in ROOT.glob(pattern)]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES if path.suffix != ".png"}
for notebook in ROOT.glob("docs/notebooks/*.ipynb"):
    cells = json.loads(notebook.read_text())["cells"]
    TEXTS[str(notebook.relative_to(ROOT))] = "\n".join("".join(cell["source"]) + "\n" for cell in cells)


RUN = re.compile(
    r"(?:-m ((?:training|dataset_scripts|performance)(?:\.\w+)+)|(?:^ *|`)(mammodino [a-z]\w*))([^`#&\n]*)",
    re.MULTILINE,
)


def commands_in(text: str) -> set[tuple[str, ...]]:
    """What a text runs: a module or `mammodino COMMAND`, and its options. A line that ends in a backslash goes on."""
    found = RUN.findall(re.sub(r"\\\n\s*", " ", text))
    return {(module or command, *re.findall(r"(?<!\S)--\w[\w-]*", words)) for module, command, words in found}


class Parsed(Exception):
    """Carries the parser of a command whose arguments are about to be parsed."""


def known_options(command: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every option of the parser that the command makes."""

    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser, *arguments, **options):
        if not parser.add_help:  # looks ahead for one option
            return parse(parser, *arguments, **options)
        raise Parsed(parser)

    name, *rest = command.split()
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", [name])
        module = "modeling_mammodino.tools.cli" if rest else name
        if find_spec(module).submodule_search_locations:
            module = f"{module}.__main__"
        with pytest.raises(Parsed) as parsed:
            import_module(module).main()
    parser = parsed.value.args[0]
    if rest:
        (commands,) = [each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        assert rest[0] in commands, command
        parser = commands[rest[0]]
    return set(parser._option_string_actions)


@pytest.mark.slow
def test_options_that_are_named_are_known_to_their_commands(monkeypatch):
    used: dict[str, set[tuple[str, str]]] = {}
    for page, text in TEXTS.items():
        if page != "CHANGELOG.md":
            for command, *options in commands_in(text):
                used.setdefault(command, set()).update((option, page) for option in options)
    assert {"mammodino embed", "training.pretrain", "dataset_scripts.corpus"} <= used.keys()
    for command, options in used.items():
        known = known_options(command, monkeypatch)
        assert {each for each in options if each[0] not in known} == set(), command


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
        "docs/compare.md",
        "docs/finetuning.md",
        "docs/localize.md",
        "docs/pretraining.md",
        ".ci/run",
    ):
        for path in set(re.findall(rf"(?<![\w./])((?:{tops})/[\w./-]*\w)", TEXTS[page])):
            assert (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.slow
def test_the_detr_example_has_the_encoders_weights():
    from modeling_mammodino.tools.command import shipped_model

    (example,) = [code for code in re.findall(r"```python\n(.*?)```", TEXTS["docs/export.md"], re.S) if "Detr" in code]
    names: dict = {}
    exec(example.replace("model_cards/mammodino-small", str(shipped_model())), names)
    own, loaded = names["backbone"].state_dict(), names["detector"].model.backbone.state_dict()
    assert own and all((loaded[f"model.{name}"] == value).all() for name, value in own.items())


def test_every_recipe_is_in_the_readme():
    for recipe in (ROOT / "training" / "recipes").glob("*.yaml"):
        assert f"`{recipe.stem}`" in TEXTS["README.md"]
