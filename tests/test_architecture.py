"""The tree: imports go down only and never in a circle, and each thing has one place."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# from the top; a module imports from its own layer and from those below it; the longest prefix that fits counts
LAYERS = [
    ["space"],
    ["performance"],
    ["training"],  # entry points
    ["training.studies"],
    ["training.pretraining"],
    ["training.evaluation"],
    ["training.settings"],
    ["dataset_scripts.benchmarks"],
    ["dataset_scripts.corpus", "dataset_scripts.phantom"],
    ["dataset_scripts"],  # the bare package
    ["modeling_mammodino.tools"],
    ["modeling_mammodino"],
]
# names of several files, whose packages say the difference; a script of performance/ has the name of what it times
SAME_NAME = {
    *("__init__", "__main__"),
    "dicom",  # read a file; write a simulated one
    "archive",  # files to read, wherever they are; simulated files to write
    "verify",  # a corpus; a labeled data set
    "export",  # a labeled data set; an encoder
    "features",  # of files, in the installed package; the command that draws them
    "report",  # of a study; of a benchmark suite
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the tree by its dotted name."""
    found = {}
    for top in ("space", "performance", "training", "dataset_scripts", "modeling_mammodino"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports of the tree, inside functions too."""
    return {name: set(_imports(name, path)) & modules().keys() - {name} for name, path in modules().items()}


def _imports(name: str, path: Path) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            of_base = [f"{base}.{each.name}" for each in node.names]
            yield from (each if each in modules() else base for each in of_base)


def layer(name: str) -> tuple[int, str]:
    """Number from the top, and the prefix by which it was found."""
    fits = [(len(prefix), number, prefix) for number, layer in enumerate(LAYERS) for prefix in layer
            if f"{name}.".startswith(f"{prefix}.")]  # fmt: skip
    _, number, prefix = max(fits)
    return number, prefix


def test_no_module_imports_from_a_layer_above_it_or_beside_it():
    upward = []
    for name, imported in imports().items():
        (own, prefix) = layer(name)
        for other in imported:
            number, other_prefix = layer(other)
            if number < own or number == own and prefix != other_prefix:
                upward.append(f"{name} -> {other}")
    assert not upward


def test_no_imports_form_a_cycle():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_is_named_utils_and_two_of_one_name_are_told_apart_by_their_packages():
    names: dict[str, list[str]] = {}
    for module, path in modules().items():
        if not module.startswith("performance."):
            names.setdefault(path.stem, []).append(module)
    assert not names.keys() & {"utils", "util", "helpers", "common", "misc"}
    assert {stem: found for stem, found in names.items() if len(found) > 1 and stem not in SAME_NAME} == {}


def test_atomic_writes_are_in_one_place():
    found = {name for name, path in modules().items() if "os.replace(" in path.read_text()}
    assert found == {"modeling_mammodino.tools.files"}


def test_files_that_a_checkpoint_carries_import_each_other_in_the_one_form_that_the_hub_reads():
    """`from .name import x`; nothing from tools/, nothing of deeper levels."""
    for path in (ROOT / "modeling_mammodino").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module and node.module != "tools", path.name
            elif isinstance(node, ast.ImportFrom | ast.Import):
                named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                assert not any(each.split(".")[0] == "modeling_mammodino" for each in named), path.name
