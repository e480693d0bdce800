"""Publish an exported data set on the Hugging Face Hub, private unless said otherwise."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

FILES_A_COMMIT = 20  # some 10 GB; the Hub limits commits an hour
CARD, DATA = "README.md", "data"


def push_export(folder: str | Path, repo_id: str, *, public: bool = False, token: str | None = None) -> str:
    """Sends data/*.parquet, then the card; returns the repository's address.

    public: else the repository must be private; it is made so where it does not exist, and a public one is refused.

    Raises ValueError where the repository is public or holds Parquet files of another export; ConnectionError where the
    Hub is out of reach; huggingface_hub's HfHubHTTPError where it refuses.
    """
    api = HfApi(token=token, library_name="mammodino")
    try:
        return _push(api, Path(folder), repo_id, public)
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):  # says itself what is wrong
            raise
        raise ConnectionError(f"the Hub cannot be reached ({error}); check the network and HF_ENDPOINT") from error


def _push(api: HfApi, folder: Path, repo_id: str, public: bool) -> str:
    repo = api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
    repo_id = repo.repo_id
    if not public and not api.repo_info(repo_id, repo_type="dataset").private:
        raise ValueError(f"{repo_id} exists and is public; nothing was sent. Make it private there, or pass --public")
    ours = {f"{DATA}/{path.name}": path for path in sorted((folder / DATA).glob("*.parquet"))}
    there = _parquet_files(api, repo_id)
    additions = {name: CommitOperationAdd(name, path) for name, path in ours.items()}
    # a card reads by a pattern: the files of two exports would be read as one
    others = [
        name for name, sha256 in there.items() if name not in ours or additions[name].upload_info.sha256.hex() != sha256
    ]
    if others:
        raise ValueError(
            f"{repo_id} holds {len(others)} files of another export, {min(others)} first; nothing was sent. Push to "
            "another name, or delete them there"
        )
    missing = [addition for name, addition in additions.items() if name not in there]
    for start in range(0, len(missing), FILES_A_COMMIT):
        _commit(api, repo_id, missing[start : start + FILES_A_COMMIT], "Add rows")
    _commit(api, repo_id, [CommitOperationAdd(CARD, folder / CARD)], "Add card")
    return str(repo)


def _commit(api: HfApi, repo_id: str, additions: list[CommitOperationAdd], message: str) -> None:
    api.create_commit(repo_id, additions, commit_message=message, repo_type="dataset")


def _parquet_files(api: HfApi, repo_id: str) -> dict[str, str | None]:
    """sha256 of each, by path."""
    entries = api.list_repo_tree(repo_id, repo_type="dataset", recursive=True)
    return {each.path: each.lfs.sha256 if each.lfs else None for each in entries if each.path.endswith(".parquet")}
