"""Features of files: what a row holds, against model and processor called by hand; order, refusals, the table."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import cv2
import datasets
import forked
import numpy as np
import pandas as pd
import pyarrow.parquet
import pydicom
import pytest
import torch
from dicom_builders import CT, RAMP, build, save
from made_inputs import HASH_KEY, draw_breast
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import RLELossless, generate_uid
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from modeling_mammodino import (
    MammoDinoConfig,
    MammoDinoForImageClassification,
    MammoDinoImageProcessor,
    MammoDinoModel,
    pool_tokens,
)
from modeling_mammodino.dicom import frame_order, open_dicom
from modeling_mammodino.tools import feature_table as table_module
from modeling_mammodino.tools import features as features_module
from modeling_mammodino.tools.cli import main
from modeling_mammodino.tools.embed import open_encoder, weights_sha256
from modeling_mammodino.tools.features import (
    FileEmbeddings,
    FileEnd,
    SliceReader,
    embed_files,
    extract_features,
    find_files,
    group_paths,
    pool_volumes,
    read_files,
    share,
    stream_images,
)

TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16, "image_size": 64}
NUM_SLICES = 6  # of the phantom's volumes


@pytest.fixture(scope="module")
def processor() -> MammoDinoImageProcessor:
    return MammoDinoImageProcessor(size={"height": 128, "width": 96}, patch_size=16)


@pytest.fixture(scope="module")
def model() -> MammoDinoModel:
    torch.manual_seed(0)
    return MammoDinoModel(MammoDinoConfig(**TINY)).eval()


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def volume(phantom_archive) -> Path:
    return sorted(phantom_archive.rglob("*_dbt.dcm"))[0]


@pytest.fixture(scope="module")
def archive(phantom_archive, volume, tmp_path_factory) -> Path:
    """Two volumes, a mammogram without suffix, an 8-bit JPEG, a 16-bit TIFF; three bad files, and one that is none."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "study").mkdir()
    shutil.copy(volume, folder / "b.dcm")
    shutil.copy(sorted(phantom_archive.rglob("*_dbt.dcm"))[1], folder / "study" / "IM0002")
    shutil.copy(sorted(phantom_archive.rglob("*_2d.dcm"))[0], folder / "study" / "IM0001")
    cv2.imwrite(str(folder / "a.jpg"), (draw_breast(seed=1) // 16).astype(np.uint8))
    cv2.imwrite(str(folder / "z.tiff"), draw_breast(seed=2))
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.dcm").write_text("no image")
    (folder / "cut.dcm").write_bytes(volume.read_bytes()[:-5000])
    (folder / "labels.csv").write_text("file,patient\n")
    return folder


GOOD = ("a.jpg", "b.dcm", "study/IM0001", "study/IM0002", "z.tiff")
BAD = ("cut.dcm", "empty.png", "text.dcm")


def by_hand(path: Path, model, processor, **options) -> tuple[np.ndarray, np.ndarray]:
    """(S, 2 * D) and the tissue fractions (S,), a file at a time."""
    inputs = processor(path, return_tensors="pt", **options)
    with torch.inference_mode():
        sequence = model(**inputs).last_hidden_state
    pooled = pool_tokens(sequence, model.config.num_register_tokens, inputs["tissue_mask"])
    return pooled.numpy(), inputs["tissue_mask"].mean(dim=(1, 2)).numpy()


def run(archive: Path, checkpoint: Path, output: Path, *options: str) -> pd.DataFrame:
    main(["embed", str(archive), "--model", str(checkpoint), "--output", str(output), *options])
    return pd.read_parquet(output)


def test_a_row_is_what_processor_and_model_give_by_hand(archive, checkpoint, model, processor, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMMODINO_HASH_KEY", HASH_KEY)
    frame = run(archive, checkpoint, tmp_path / "features.parquet", "--pool", "both", "--num_workers", "0")
    about = ["mask_confidence", "laterality", "view", "patient"]
    assert list(frame) == ["path", "volume", "slice", "num_slices", "embedding", "tissue_fraction", *about]
    assert frame["path"].drop_duplicates().tolist() == [str(archive / name) for name in GOOD]
    assert frame["volume"].tolist() == frame["path"].tolist()
    for name in GOOD:
        rows = frame[frame["path"] == str(archive / name)]
        expected, tissue = by_hand(archive / name, model, processor)
        assert rows["slice"].tolist() == list(range(len(expected))) and set(rows["num_slices"]) == {len(expected)}
        np.testing.assert_allclose(np.stack(rows["embedding"]), expected, atol=1e-6)
        np.testing.assert_allclose(rows["tissue_fraction"], tissue, atol=1e-6)
        slices = list(processor.render_source(archive / name, (128, 96), hash_key=HASH_KEY.encode()))
        assert rows["mask_confidence"].tolist() == [np.float32(rendered.small.confidence) for _, rendered in slices]
        for column in about[1:]:
            known = [None if pd.isna(value) else value for value in rows[column]]
            assert known == [getattr(mammogram, column) for mammogram, _ in slices]
    assert frame["patient"].notna().any() and frame["patient"].isna().any()  # a DICOM file, and a JPEG


@pytest.fixture
def forked_workers(monkeypatch):
    """Workers start from a process that has done their imports; spawned ones read in test_feature_cache.py."""
    monkeypatch.setattr(features_module, "START_METHOD", forked.CONTEXT)


@pytest.mark.slow
def test_workers_and_batches_change_nothing_but_speed(archive, model, processor, forked_workers):
    """Two processes, a batch that straddles files: the same rows in the same order, refusals in their places."""
    files = find_files([archive]).files
    alone = list(embed_files(files, model, processor, batch_size=8))
    shared = list(embed_files(files, model, processor, batch_size=3, num_workers=2))
    assert [(a.path, a.refused, a.volume, a.slices) for a in alone] == [
        (b.path, b.refused, b.volume, b.slices) for b in shared
    ]
    assert [Path(each.path).name for each in alone if each.refused] == list(BAD)
    for a, b in zip(alone, shared, strict=True):
        np.testing.assert_allclose(a.embeddings, b.embeddings, atol=1e-6)
        np.testing.assert_array_equal(a.tissue_fraction, b.tissue_fraction)


@pytest.mark.slow
def test_files_are_read_whole_and_in_order_whatever_the_workers(archive, processor, forked_workers):
    files = find_files([archive]).files
    alone, shared = (list(read_files(files, SliceReader(processor, 2), num_workers)) for num_workers in (0, 2))
    assert [file.name for file, each in zip(files, alone, strict=True) if isinstance(each, str)] == list(BAD)
    for a, b in zip(alone, shared, strict=True):
        assert a == b if isinstance(a, str) else len(a) == len(b)
        for one, other in zip(*((a, b) if isinstance(a, list) else ((), ())), strict=True):
            np.testing.assert_array_equal(one.pixel_values, other.pixel_values)


def test_weights_pool_in_place_of_tissue_and_a_model_may_pool_itself(archive, model, processor):
    (images,) = read_files([archive / "b.dcm"], SliceReader(processor))
    weights = [np.eye(*image.tissue_mask.shape, dtype=np.float32) for image in images]
    keyed = [
        (number, {**image.inputs, "weights": each})
        for number, (image, each) in enumerate(zip(images, weights, strict=True))
    ]
    found = list(extract_features(model, keyed, pool="all", batch_size=4))
    assert [number for number, _ in found] == list(range(len(images)))
    inputs = {name: torch.from_numpy(np.stack([image.inputs[name] for image in images])) for name in images[0].inputs}
    with torch.inference_mode():
        tokens = model(**inputs).last_hidden_state
    expected = pool_tokens(tokens, model.config.num_register_tokens, torch.from_numpy(np.stack(weights)))
    features = np.stack([feature for _, feature in found])
    np.testing.assert_allclose(features[:, :48], expected, atol=1e-6)
    patches = tokens[:, 1 + model.config.num_register_tokens :]
    diagonal = torch.from_numpy(weights[0].ravel() > 0)
    np.testing.assert_allclose(features[:, 48:], patches[:, diagonal].amax(dim=1), atol=1e-6)

    class ClassToken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model

        def forward(self, pixel_values, tissue_mask=None):
            return self.encoder(pixel_values, tissue_mask=tissue_mask).last_hidden_state[:, 0]

    plain = [(number, image.inputs) for number, image in enumerate(images)]
    own = [feature for _, feature in extract_features(ClassToken(), plain, pool=None)]
    np.testing.assert_array_equal(own, [feature for _, feature in extract_features(model, plain, pool="class")])


@pytest.mark.parametrize("num_files, num_workers", [(1, 1), (7, 3), (12, 4), (3, 8)])
def test_workers_share_every_file_once(num_files, num_workers):
    shares = [list(share(num_files, worker, num_workers)) for worker in range(num_workers)]
    assert sorted(sum(shares, [])) == list(range(num_files))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alternating_files_are_shared_evenly():
    volumes = [sum(file % 2 for file in share(100, worker, 2)) for worker in range(2)]
    assert volumes == [25, 25]


@pytest.mark.parametrize(
    "settings", [{}, {"do_normalize": False, "chest_wall_side": "right"}, {"bit_depth": 16, "image_mean": [0.4]}]
)
def test_the_stream_is_the_image_processor_bit_for_bit(archive, settings):
    processor = MammoDinoImageProcessor(size={"height": 96, "width": 128}, patch_size=16, **settings)
    for name in GOOD:
        for count in (0, 1, 4):
            *items, end = stream_images([archive / name], SliceReader(processor, count))
            images = [image for _, image in items]
            expected = processor(archive / name, slices_per_volume=count, return_tensors="np")
            assert end == FileEnd(0) and {position for position, _ in items} == {0}
            np.testing.assert_array_equal([each.pixel_values for each in images], expected["pixel_values"])
            np.testing.assert_array_equal([each.tissue_mask for each in images], expected["tissue_mask"])


def test_a_slice_has_its_number_also_where_few_are_taken(volume, model, processor):
    (everything,) = embed_files([volume], model, processor)
    (some,) = embed_files([volume], model, processor, slices_per_volume=2)
    assert some.num_slices == NUM_SLICES and len(some.slices) == 2
    np.testing.assert_allclose(some.embeddings, everything.embeddings[some.slices], atol=1e-6)


def test_pool_picks_its_part_and_models_stand_side_by_side(archive, model, processor):
    torch.manual_seed(1)
    other = MammoDinoModel(model.config).eval()
    files = [archive / "a.jpg", archive / "study" / "IM0001"]
    pools = {pool: list(embed_files(files, model, processor, pool=pool)) for pool in ("class", "patches", "both")}
    pair = list(embed_files(files, [model, other], processor, pool="both"))
    for n, file in enumerate(files):
        expected, _ = by_hand(file, model, processor)
        np.testing.assert_allclose(pools["class"][n].embeddings, expected[:, :24], atol=1e-6)
        np.testing.assert_allclose(pools["patches"][n].embeddings, expected[:, 24:], atol=1e-6)
        np.testing.assert_array_equal(pools["both"][n].embeddings, pair[n].embeddings[:, :48])
        np.testing.assert_allclose(pair[n].embeddings[:, 48:], by_hand(file, other, processor)[0], atol=1e-6)


def test_pooled_volumes_are_means_and_have_no_slice(archive, checkpoint, model, processor, tmp_path):
    frame = run(archive, checkpoint, tmp_path / "features.parquet", "--pool_volumes", "--num_workers", "0")
    assert frame["path"].tolist() == [str(archive / name) for name in GOOD]
    assert frame["num_slices"].tolist() == [1, NUM_SLICES, 1, NUM_SLICES, 1]
    assert frame["slice"].isna().tolist() == [False, True, False, True, False]
    for name, row in zip(GOOD, frame.itertuples(), strict=True):
        expected, tissue = by_hand(archive / name, model, processor)
        np.testing.assert_allclose(row.embedding, expected[:, :24].mean(axis=0), atol=1e-6)
        assert row.tissue_fraction == pytest.approx(tissue.mean(), abs=1e-6)


def split_into_files(volume: Path, folder: Path) -> list[Path]:
    """A volume as CT-like files of one slice each, of one series, as older systems store it."""
    source = pydicom.dcmread(volume)
    paths = []
    for number, plane in enumerate(source.pixel_array):
        image = pydicom.dcmread(volume)
        for name in ("NumberOfFrames", "PerFrameFunctionalGroupsSequence"):
            delattr(image, name)
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(number)])
        image.PixelData = plane.tobytes()
        group = source.PerFrameFunctionalGroupsSequence[number]
        image.ImagePositionPatient = group.PlanePositionSequence[0].ImagePositionPatient
        paths.append(folder / f"{number}_{folder.name}.dcm")
        image.save_as(paths[-1])
    return paths


def test_slices_that_are_files_of_their_own_share_a_volume(phantom_archive, model, processor, tmp_path):
    """Two such series, their files interleaved by name, an image between them: features are those of the volumes in one
    file, under one crop and window."""
    for name, volume in zip(("l", "r"), sorted(phantom_archive.rglob("*_dbt.dcm"))[:2], strict=True):
        (tmp_path / name).mkdir()
        for path in split_into_files(volume, tmp_path / name):
            path.rename(tmp_path / path.name)
    cv2.imwrite(str(tmp_path / "2_between.png"), draw_breast())
    files = find_files([tmp_path]).files
    results = list(embed_files(files, model, processor))
    assert not [each.refused for each in results if each.refused]
    for each in results:
        side = Path(each.path).stem[-1]
        assert each.volume == (each.path if side == "n" else str(tmp_path / f"0_{side}.dcm"))
    pooled = list(pool_volumes(results))
    assert [Path(each.path).name for each in pooled] == ["0_l.dcm", "0_r.dcm", "2_between.png"]
    assert [(each.num_slices, each.slices) for each in pooled] == [(6, [None]), (6, [None]), (1, [0])]
    for name, volume in zip(("l", "r"), sorted(phantom_archive.rglob("*_dbt.dcm"))[:2], strict=True):
        of_volume = [each for each in results if each.path.endswith(f"_{name}.dcm")]
        (whole,) = embed_files([volume], model, processor)
        places = [frame_order(volume).index(frame) for frame in range(6)]
        assert [(each.slices, each.num_slices) for each in of_volume] == [([place], 6) for place in places]
        found = np.concatenate([each.embeddings for each in of_volume])
        np.testing.assert_allclose(found, whole.embeddings[places], atol=1e-6)
    left = np.concatenate([each.embeddings for each in results if each.path.endswith("_l.dcm")])
    np.testing.assert_allclose(pooled[0].embeddings[0], left.mean(axis=0), atol=1e-6)


def test_a_series_with_a_damaged_slice_is_refused_whole(volume, archive, model, processor, tmp_path):
    paths = split_into_files(volume, tmp_path)
    paths[3].write_bytes(paths[3].read_bytes()[:-500])
    *refused, good = embed_files([*paths, archive / "a.jpg"], model, processor)
    assert good.refused is None and "truncated" in refused[3].refused and refused[3].refused.startswith(str(paths[3]))
    assert refused[0].refused == f"{paths[0]}: a slice of the same volume as {refused[3].refused}"


def test_a_file_of_its_own_is_no_slice_of_another(volume, model, processor, tmp_path):
    cut, gone = tmp_path / "two  spaces.dcm", tmp_path / "gone  .dcm"
    cut.write_bytes(volume.read_bytes()[:-5000])
    results = list(embed_files([cut, gone, tmp_path / "gone.png"], model, processor))
    for result, name, words in zip(
        results, ("two spaces.dcm", "gone .dcm", "gone.png"), ("truncated", "", ""), strict=True
    ):
        assert result.refused.startswith(f"{tmp_path}/{name}: ") and result.refused.count(name) >= 1
        assert "same volume" not in result.refused and words in result.refused


def test_slices_of_ct_share_a_volume_and_copies_of_them_another(model, tmp_path):
    processor = MammoDinoImageProcessor(size={"height": 128, "width": 96}, patch_size=16, tissue_finder="body")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for n in range(3):
            place = {"ImagePositionPatient": [0, 0, -2.5 * n], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
            image = np.roll(draw_breast(seed=n), 100, axis=1)
            about = {"SOPClassUID": CT, "Modality": "CT", "SeriesInstanceUID": "1.2.9", "SOPInstanceUID": f"1.2.9.{n}"}
            save(build(image, **about, **place), tmp_path / folder, f"{n}.dcm")
    results = list(embed_files(find_files([tmp_path])[0], model, processor))
    assert [each.volume for each in results] == [str(tmp_path / "a" / "0.dcm")] * 3 + [
        str(tmp_path / "b" / "0.dcm")
    ] * 3
    assert [each.slices for each in results] == [[2], [1], [0]] * 2  # in order of position
    assert [each.num_slices for each in pool_volumes(results)] == [3, 3]


def test_a_scout_and_a_second_phase_are_volumes_of_their_own(tmp_path):
    about = {
        "SOPClassUID": CT,
        "Modality": "CT",
        "SeriesInstanceUID": "1.2.9",
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    }
    paths = [
        save(build(SOPInstanceUID=f"1.2.{n}", InstanceNumber=n, ImagePositionPatient=[0, 0, 2.0 * (n % 3)], **about),
             tmp_path, f"{n}.dcm")
        for n in range(6)
    ]  # fmt: skip
    scout = build(RAMP[:40], SOPInstanceUID="1.3", InstanceNumber=9, ImagePositionPatient=[0, 0, 0.0], **about)
    paths.append(save(scout, tmp_path, "scout.dcm"))
    assert group_paths(paths) == [[0, 1, 2], [3, 4, 5], [6]]
    for path in paths[:6]:  # a position that all share tells nothing
        dataset = pydicom.dcmread(path)
        dataset.ImagePositionPatient = [0, 0, 0]
        dataset.save_as(path)
    assert group_paths(paths) == [[0, 1, 2, 3, 4, 5], [6]]


def test_slices_to_which_an_anonymizer_gave_one_uid_are_a_volume(tmp_path):
    about = {"SOPClassUID": CT, "SeriesInstanceUID": "1.2.9", "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    paths = [
        save(build(SOPInstanceUID="1.2.9.1", ImagePositionPatient=[0, 0, -2.0 * n], **about), tmp_path, f"{n}.dcm")
        for n in range(4)
    ]
    copy = shutil.copy(paths[0], tmp_path / "copy.dcm")
    assert group_paths([*paths, copy]) == [[3, 2, 1, 0], [4]]


def test_bad_files_are_named_and_the_rest_goes_on(archive, checkpoint, tmp_path, capsys):
    output = tmp_path / "deep" / "features.parquet"
    run(archive, checkpoint, output, "--num_workers", "0")
    with (output.parent / "features.refused.csv").open() as stream:
        refused = {row["file"]: row["reason"] for row in csv.DictReader(stream)}
    assert list(refused) == [str(archive / name) for name in BAD]
    assert "truncated" in refused[str(archive / BAD[0])] and "empty" in refused[str(archive / BAD[1])]
    assert "3 refused" in capsys.readouterr().out
    run(archive / "study", checkpoint, output, "--overwrite", "--num_workers", "0")
    assert [path.name for path in output.parent.iterdir()] == ["features.parquet"]  # the old list goes


@pytest.mark.parametrize("options", [(), ("--pool_volumes",)])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(volume, archive, checkpoint, tmp_path, monkeypatch, options):
    """It stops between the files of one volume, whose first are done."""
    folder, output = tmp_path / "archive", tmp_path / "features.parquet"
    shutil.copytree(archive, folder)
    for number, path in enumerate(split_into_files(volume, folder)):
        path.rename(folder / f"{'a' if number < 3 else 'y'}{number}.dcm")
    options = ("--num_workers", "0", "--batch_size", "1", *options)
    expected = run(folder, checkpoint, tmp_path / "whole.parquet", *options)
    refused = (tmp_path / "whole.refused.csv").read_text()

    encode, calls = features_module._encode_batch, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > 9:
            raise RuntimeError("CUDA out of memory")
        return encode(*arguments)

    monkeypatch.setattr(features_module, "_encode_batch", stop)
    with pytest.raises(SystemExit, match="CUDA out of memory"):
        run(folder, checkpoint, output, *options)
    parts = tmp_path / "features.parquet.parts"
    assert not output.exists() and (parts / "000000.parquet").exists()
    with pytest.raises(SystemExit, match="parts: holds the beginning of a run with other files or options"):
        run(folder, checkpoint, output, *options, "--pool", "patches")
    with monkeypatch.context() as other, pytest.raises(SystemExit, match="with other files or options"):
        other.setenv("MAMMODINO_HASH_KEY", "another key, whose hashes are others")
        run(folder, checkpoint, output, *options)
    monkeypatch.setattr(features_module, "_encode_batch", encode)
    found = run(folder, checkpoint, output, *options)
    pd.testing.assert_frame_equal(found, expected)
    assert (tmp_path / "features.refused.csv").read_text() == refused and not parts.exists()


@pytest.mark.slow
def test_a_killed_reader_is_said_with_its_likely_cause(forked_workers):
    with pytest.raises(
        RuntimeError, match="one of 1 processes that read files was killed, mostly by a system short of"
    ):
        list(stream_images([signal.SIGKILL], signal.raise_signal, num_workers=1))


def test_names_that_are_not_utf8_are_kept_readable(checkpoint, tmp_path):
    folder = tmp_path / "old archive"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), draw_breast())
    (folder / "a.png").rename(os.fsdecode(os.fsencode(folder) + b"/K\xf6ln.png"))
    Path(os.fsdecode(os.fsencode(folder) + b"/\xfc.png")).write_bytes(b"")
    os.mkfifo(folder / "pipe")  # would block whoever opens it
    frame = run(folder, checkpoint, tmp_path / "features.parquet")
    assert frame["path"].tolist() == [f"{folder}/K\\udcf6ln.png"]
    assert pd.read_csv(tmp_path / "features.refused.csv")["file"].tolist() == [f"{folder}/\\udcfc.png"]


def test_a_volume_streams_and_counts_whole_or_not_at_all(volume, archive, model, processor, tmp_path):
    """A slice is damaged that the plan of the volume does not see: those before it are out before it is reached."""
    image, broken = pydicom.dcmread(volume), 2
    image.compress(RLELossless)
    frames = list(generate_frames(image.PixelData, number_of_frames=NUM_SLICES))
    frames[frame_order(volume)[broken]] = b"\xff" * 64
    image.PixelData = encapsulate(frames)
    image.save_as(tmp_path / "damaged.dcm")
    items = list(stream_images([tmp_path / "damaged.dcm"], SliceReader(processor)))
    assert [type(each) for each in items] == [tuple] * broken + [FileEnd]
    damaged, good = embed_files([tmp_path / "damaged.dcm", archive / "a.jpg"], model, processor, batch_size=1)
    assert "damaged.dcm" in damaged.refused and damaged.slices == [] and len(damaged.embeddings) == 0
    assert good.refused is None and good.slices == [0]


def test_without_a_good_file_the_command_fails_and_says_where(archive, checkpoint, tmp_path):
    for name in ("text.dcm", "labels.csv"):  # a file that is named is tried, whatever its suffix
        with pytest.raises(SystemExit, match="none of 1 files .*features.refused.csv") as stop:
            run(archive / name, checkpoint, tmp_path / "features.parquet", "--num_workers", "0")
        assert isinstance(stop.value.code, str)  # printed, and exit status 1
        assert [path.name for path in tmp_path.iterdir()] == ["features.refused.csv"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match="no DICOM file or image"):
        run(tmp_path / "folder", checkpoint, tmp_path / "features.parquet")
    with pytest.raises(SystemExit, match="gone"):
        run(tmp_path / "gone", checkpoint, tmp_path / "features.parquet")


def made_up(path: str, rows: int = 3, features: int = 5) -> FileEmbeddings:
    values = np.random.default_rng(rows).normal(size=(rows, features)).astype(np.float32)
    return FileEmbeddings(path, None, path, list(range(rows)), rows, values, values[:, 0], values[:, 0])


def test_the_table_is_written_atomically(tmp_path, monkeypatch):
    """Row groups of one file each; the work is interrupted after two, where a table stands and where none does."""
    monkeypatch.setattr(table_module, "ROW_GROUP_BYTES", 1)
    output = tmp_path / "features.parquet"

    def interrupted():
        yield made_up("a")
        yield made_up("b")
        assert list(tmp_path.glob(".features.parquet.*"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table_module.write_table(interrupted(), output, {})
    assert not list(tmp_path.iterdir())
    assert table_module.write_table([made_up("old"), made_up("other", 2)], output, {}) == 5
    assert pyarrow.parquet.ParquetFile(output).num_row_groups == 2
    before = output.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        table_module.write_table(interrupted(), output, {})
    assert output.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_output_is_not_replaced_unasked(archive, checkpoint, tmp_path):
    output = tmp_path / "features.parquet"
    output.write_text("precious")
    with pytest.raises(SystemExit, match="--overwrite"):
        run(archive, checkpoint, output)
    assert output.read_text() == "precious"
    with pytest.raises(SystemExit, match="is a folder; give a file in it"):
        run(archive, checkpoint, tmp_path, "--overwrite")


def test_the_table_opens_everywhere_and_says_where_it_comes_from(archive, checkpoint, processor, tmp_path):
    output = tmp_path / "features.parquet"
    frame = run(archive, checkpoint, output, "--dtype", "bfloat16", "--slices_per_volume", "2", "--num_workers", "0")
    assert np.stack(frame["embedding"]).shape == (len(frame), 24) == (7, 24)
    assert frame.dtypes[["slice", "num_slices", "tissue_fraction"]].tolist() == ["int32", "int32", "float32"]
    loaded = datasets.load_dataset("parquet", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    features = np.asarray(loaded.with_format("numpy")["embedding"])
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, np.stack(frame["embedding"]))
    schema = pyarrow.parquet.read_schema(output)
    assert schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 24)
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert "Research use only" in metadata["notice"] and metadata["model"] == str(checkpoint)
    assert metadata["weights_sha256"] == weights_sha256(open_encoder(str(checkpoint))[0])
    assert (metadata["pool"], metadata["dtype"], metadata["slices_per_volume"]) == ("class", "bfloat16", "2")
    assert metadata["image_processor"] == json.dumps(processor.to_dict(), sort_keys=True)
    patient = pydicom.dcmread(archive / "b.dcm", stop_before_pixels=True)
    assert patient.PatientID.encode() not in output.read_bytes() and patient.SOPInstanceUID.encode() not in (
        output.read_bytes()
    )


def test_encoders_of_every_kind_of_folder(archive, model, processor, tmp_path):
    """A classification checkpoint, transformers' own class with our image processor, and what is neither."""
    torch.manual_seed(0)
    classifier = MammoDinoForImageClassification(MammoDinoConfig(**model.config.to_dict() | {"num_labels": 3})).eval()
    native = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, num_channels=1)).eval()
    inputs = processor(archive / "a.jpg", return_tensors="pt")
    for name, source in (("head", classifier), ("native", native)):
        source.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="preprocessor_config.json"):
            open_encoder(str(tmp_path / name))
        processor.save_pretrained(tmp_path / name)
        encoder, found = open_encoder(str(tmp_path / name))
        assert isinstance(encoder, MammoDinoModel) and found.to_json_string() == processor.to_json_string()
        with torch.inference_mode():
            expected = getattr(source, "dinov2_with_registers", source)(inputs["pixel_values"]).pooler_output
            assert torch.allclose(encoder(inputs["pixel_values"]).pooler_output, expected, atol=1e-5)
    opened, _ = open_encoder(str(tmp_path / "head"), trust_remote_code=True)
    assert torch.equal(opened.layernorm.weight, classifier.dinov2_with_registers.layernorm.weight)


def test_patches_are_the_tokens_of_the_grid(archive, checkpoint, model, processor, tmp_path):
    main(["embed", str(archive / "a.jpg"), "--model", str(checkpoint), "--output", str(tmp_path / "a.pq"), "--patches"])
    metadata = pyarrow.parquet.read_schema(tmp_path / "a.pq").metadata
    (feature,) = pd.read_parquet(tmp_path / "a.pq")["embedding"]
    with torch.inference_mode():
        tokens = model(**processor(archive / "a.jpg", return_tensors="pt")).last_hidden_state
    grid = json.loads(metadata[b"grid"])
    expected = tokens[0, 1 + model.config.num_register_tokens :].reshape(*grid, -1)
    assert grid == [8, 6] and metadata[b"pool"] == b"tokens"
    np.testing.assert_allclose(feature.reshape(8, 6, 24), expected.numpy(), atol=1e-6)


def test_a_hub_out_of_reach_is_said_and_not_taken_for_a_missing_file(archive, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match="mammodino embed: We couldn't connect to"):
        main(["embed", str(archive), "--model", "someone/far", "--output", str(tmp_path / "a.parquet")])


def test_what_does_not_fit_is_refused_before_any_work(archive, checkpoint, model, processor, tmp_path):
    other = MammoDinoImageProcessor(size={"height": 98, "width": 98}, patch_size=14)
    with pytest.raises(ValueError, match="patch_size: 16 in the encoder, 14"):
        embed_files([archive / "a.jpg"], model, other)
    for options, message in (
        ({"pool": "mean"}, "pool='mean'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"slices_per_volume": -1}, "slices_per_volume=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_files([archive / "a.jpg"], model, processor, **options)
    with pytest.raises(ValueError, match="training mode"):
        embed_files([archive / "a.jpg"], MammoDinoModel(model.config).train(), processor)
    with pytest.raises(SystemExit, match="gone: no such folder"):
        run(archive, tmp_path / "gone", tmp_path / "x.parquet")
    with pytest.raises(SystemExit, match="x.csv: give a name that ends in .parquet or .pq"):
        run(archive, checkpoint, tmp_path / "x.csv")
    with pytest.raises(SystemExit, match="--device nowhere"):
        run(archive, checkpoint, tmp_path / "x.parquet", "--device", "nowhere")
    assert open_dicom(archive / "b.dcm").num_frames == NUM_SLICES and not list(tmp_path.iterdir())
