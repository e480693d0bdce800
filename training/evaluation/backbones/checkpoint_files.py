"""Checkpoint files of other projects: found in a folder or on the Hub, read without running their code, and fitted into
a model of transformers with every key accounted for."""

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

# What training configurations are pickled as. Objects of these types are skipped, not made; any other is refused.
CONFIGURATION = re.compile(
    r"omegaconf\.[\w.]+|argparse\.Namespace|typing\.Any|collections\.defaultdict|pathlib\.(Posix|Pure)\w*Path"
    r"|numpy\.dtype(s\.\w+)?|numpy\._?core\.multiarray\.scalar"
    r"|((builtins|__builtin__)\.)?(bool|bytes|dict|float|int|list|object|str|tuple)"
)
# parameters that no feature depends on
UNUSED = re.compile(r"(^|\.)(mask_token$|pooler\.)")


class Skipped:
    """Stands for an object of a training configuration, whose own code is not run."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Skipped":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def find_file(source: str, names: Sequence[str], suffix: str = "") -> Path | None:
    """Return the first of `names` in a folder or Hub repository, else the one file of a folder that ends in `suffix`.

    A file is itself; `OWNER/NAME/PATH` is one file of a repository. None where there is no such file.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if found := [path / name for name in names if (path / name).is_file()]:
            return found[0]
        found = sorted(path.glob(f"*{suffix}")) if suffix else []
        if len(found) > 1:
            raise ValueError(f"{len(found)} files *{suffix} in the folder; give the path of one")
        return found[0] if found else None
    if source.count("/") > 1:
        owner, repository, name = source.split("/", 2)
        return Path(cached_file(f"{owner}/{repository}", name))  # type: ignore[arg-type]
    for name in names:
        if found_file := cached_file(source, name, _raise_exceptions_for_missing_entries=False):
            return Path(found_file)
    return None


def find_beside(source: str, name: str) -> Path | None:
    """Return the file `name` in a folder or Hub repository, or beside a file."""
    path = Path(source)
    if path.is_file():
        return beside if (beside := path.parent / name).is_file() else None
    if not path.exists() and source.count("/") > 1:  # OWNER/NAME/PATH
        source = "/".join(source.split("/")[:2])
    return find_file(source, (name,))


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the state dict in a file of `torch.save` or safetensors: under `model` or `state_dict` where training
    wrapped it.

    Only tensors and plain values are read (`weights_only=True`), and what a training configuration consists of is
    skipped. Raises ValueError, with the remedy, for all else; none of a file's code is run.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    foreign = _foreign_types(path)
    if unknown := [name for name in foreign if not CONFIGURATION.fullmatch(name)]:
        raise ValueError(
            f"{path.name}: refused, for it holds more than tensors ({some(unknown)}); none of its code was run. If you "
            'trust its source, save the tensors alone where it can be read: python -c "import torch; '
            f"torch.save(torch.load('{path.name}', weights_only=False)['model'], 'tensors.pt')\""
        )
    allowed: list[Any] = [(Skipped, name) for name in foreign]
    try:
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # on a damaged file torch's reader fails in any way
        reason = first_line(error).partition(". ")[0]
        raise ValueError(
            f"{path.name}: cannot be read as tensors, none of its code was run ({reason}); fetch it again"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(wrapper), dict):
            checkpoint = checkpoint[wrapper]
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path.name}: holds a {type(checkpoint).__name__}; a dict of tensors is needed")
    return checkpoint


def _foreign_types(path: Path) -> list[str]:
    """Return names of the types in a file of `torch.save` that are neither tensors nor plain values; nothing is run."""
    if not zipfile.is_zipfile(path):  # the format before torch 1.6: torch.load refuses all that is foreign in it
        return []
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError(
                f"{path.name}: is a TorchScript program, as OpenAI's files are; save its tensors: python -c \"import "
                f"torch; torch.save(torch.jit.load('{path.name}', 'cpu').state_dict(), 'tensors.pt')\""
            )
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch.load says what is wrong with it
        return []


def under(prefix: str, tensors: dict[str, Any], anchor: str, path: Path, what: str) -> dict[str, torch.Tensor]:
    """Return the tensors under `prefix`, without it, float32. `anchor` must be among them; else the file is not `what`.

    What stands before the prefix, as `module.` of distributed training, is taken off.
    """
    before = [name.removesuffix(prefix + anchor) for name in tensors if name.endswith(prefix + anchor)]
    if len(before) != 1:
        raise ValueError(f"{path.name}: not {what}: no {prefix}{anchor} among {some(list(tensors))}")
    whole = before[0] + prefix
    found = {name.removeprefix(whole): value for name, value in tensors.items() if name.startswith(whole)}
    if odd := [name for name, value in found.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"{path.name}: not tensors: {some(odd)}")
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def rename(tensors: dict[str, torch.Tensor], names: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Return the tensors under other names, each by every (pattern, replacement) in turn."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def build(kind: type[PreTrainedModel], config: Any, state: dict[str, torch.Tensor], path: Path, **options: Any) -> Any:
    """Return a model of transformers with a state dict in the names of its files; every key must fit.

    Through `from_pretrained`, which knows the names of a module in this version of transformers.
    """
    model: Any
    report: Any
    with quiet_transformers():
        model, report = kind.from_pretrained(  # type: ignore[misc]
            None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    check_report(report, f"{path.name}: ", unexpected=True)
    return model.eval()


def check_report(report: dict[str, Any], name: str = "", unexpected: bool = False) -> None:
    """Raise ValueError where `from_pretrained` left a parameter random; with `unexpected` also a tensor unread."""
    faults = {
        "missing": [each for each in report["missing_keys"] if not UNUSED.search(each)],
        "of another shape": [each[0] for each in report["mismatched_keys"]],
        "unexpected": report["unexpected_keys"] if unexpected else (),
    }
    if any(faults.values()):
        named = "; ".join(f"{fault} {some(sorted(keys))}" for fault, keys in faults.items() if keys)
        raise ValueError(f"{name}the weights do not fit the model: {named}; fetch or save the checkpoint again")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the table of keys that transformers logs: what is missing is checked here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def some(names: Sequence[str], count: int = 3) -> str:
    """Return the first names of a list, for a message."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + rest


def first_line(error: Exception) -> str:
    """Return the first line of a message, or the error's name where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")
