"""The walk over folders of every command that takes an archive: which files it holds, what is left out, and why."""

import os
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

# Thumbnails, snapshots and deleted files, which NAS and desktop systems keep beside the files of people; in lower case.
SYSTEM_NAMES = {
    *("@eadir", "#recycle", "#snapshot", "@tmp", "@recycle", "@recently-snapshot", ".@__thumb", ".@upload_cache"),
    *("$recycle.bin", "recycler", "system volume information"),
    *("__macosx", ".spotlight-v100", ".fseventsd", ".temporaryitems", ".appledouble", ".documentrevisions-v100"),
    *("lost+found", ".snapshot", ".snapshots", ".zfs", ".thumbnails"),
}
SYSTEM_PREFIXES = (".trash", "._")
OF_SYSTEM = "kept by a NAS or desktop system (trash, thumbnails, snapshots, metadata)"
NOT_REGULAR = "no regular file (a pipe, a socket, a device, a link that leads nowhere)"
ENTERED = "a link to a folder that holds it, or that is listed already"


class Walk(NamedTuple):
    """What lies in a folder. Reasons are free of names, so that they may be counted and logged."""

    files: list[str]
    unlisted: dict[str, str]  # folders that cannot be listed: path -> reason
    passed_over: dict[str, str]  # files and folders that are no part of an archive: path -> reason


def walk(root: str | Path) -> Walk:
    """List the regular files below a folder, hidden ones too. A linked folder is entered once, behind all others.

    Raises OSError where `root` itself cannot be listed.
    """
    found = Walk([], {}, {})
    top, real_top = str(root), os.path.realpath(root)
    entered = {str(parent) for parent in Path(real_top).parents}  # a link to one of these would never end
    folders: list[tuple[str, str]] = [(top, real_top)]  # each with its real path
    linked: list[tuple[str, str]] = []
    while folders or linked:
        folder, real = folders.pop() if folders else heappop(linked)
        if real in entered:
            found.passed_over[folder] = ENTERED
            continue
        entered.add(real)
        try:
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError as error:
            if folder == top:
                raise
            found.unlisted[folder] = unlisted(error)
            continue
        for entry in entries:
            if is_of_system(entry.name):
                found.passed_over[entry.path] = OF_SYSTEM
            elif entry.is_symlink() and os.path.isdir(entry.path):
                heappush(linked, (entry.path, os.path.realpath(entry.path)))
            elif entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, os.path.join(real, entry.name)))
            elif os.path.isfile(entry.path):
                found.files.append(entry.path)
            else:
                found.passed_over[entry.path] = NOT_REGULAR
    return found


def unlisted(error: OSError) -> str:
    """Return the reason for a folder that cannot be listed, without the path that the error's message quotes."""
    return f"the folder cannot be listed ({error.strerror or type(error).__name__}); check its permissions"


def is_of_system(name: str) -> bool:
    """Whether a file or folder of that name is none of an archive's own."""
    return name.lower() in SYSTEM_NAMES or name.lower().startswith(SYSTEM_PREFIXES)
