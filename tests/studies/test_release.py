"""Files of a release: the same folder gives the same bytes, and they open as they were."""

import os
import tarfile

from training.release import pack


def test_an_archive_holds_the_folder_and_depends_on_nothing_else(tmp_path):
    folder = tmp_path / "encoder"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(bytes(range(256)))
    first = pack(folder, "tiny", tmp_path / "a").read_bytes()
    os.utime(folder / "config.json", (1, 1))
    archive = pack(folder, "tiny", tmp_path / "b")
    assert archive.read_bytes() == first and not list(archive.parent.glob(".*"))
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "out", filter="data")
    for name in ("config.json", "sub/weights"):
        assert (tmp_path / "out" / "tiny" / name).read_bytes() == (folder / name).read_bytes()
