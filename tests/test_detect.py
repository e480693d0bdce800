"""The detector's command from phantom to result: it runs, it returns what stands, and refuses in one line."""

import json

import pytest

from dataset_scripts.phantom import PhantomParameters, write_archive
from training.detect import main
from training.evaluation.small_backbones import write_small_checkpoints

QUICK = [
    *("--num_train_epochs", "1", "--map_width", "32", "--decoder_layers", "1", "--num_queries", "5"),
    *("--dataloader_num_workers", "0", "--num_resamples", "20", "--slices_per_volume", "1"),
    *("--test_slices_per_volume", "1", "--lesion_slice_reach", "0"),
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("detect")
    parameters = PhantomParameters(num_slices=4, height_px=96, width_px=64, pixel_spacing_mm=1.9, slice_spacing_mm=9.0)
    write_archive(folder / "phantom", 16, seed=2, parameters=parameters)
    encoder = write_small_checkpoints(folder / "small")["mammodino"]
    return ["--dataset", "phantom", "--data_dir", str(folder / "phantom"), "--encoder", str(encoder), *QUICK]


def test_from_phantom_to_result_and_not_again(arguments, tmp_path):
    main([*arguments, "--output_dir", str(tmp_path)])
    file = tmp_path / "result.json"
    result, written = json.loads(file.read_text()), file.stat().st_mtime_ns
    assert result["dataset"] == "phantom" and "python -m training.detect" in result["command"]
    assert result["counts"]["test"]["images"] > 0
    assert list(tmp_path.rglob("*.png")) and (tmp_path / "predictions.parquet").is_file()
    main([*arguments, "--output_dir", str(tmp_path)])
    assert file.stat().st_mtime_ns == written
    with pytest.raises(SystemExit) as error:  # other settings in the same folder
        main([*arguments, "--output_dir", str(tmp_path), "--seed", "1"])
    assert "seed" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data_dir", "/nowhere"], "/nowhere"),
        (["--encoder", "/nowhere"], "/nowhere"),
        (["--map_width", "33"], "map_width=33"),
        (["--dataset", "cmmd"], "no CMMD_clinicaldata_revision.xlsx"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, tmp_path, change, words):
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--output_dir", str(tmp_path / "out"), *change])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "result.json").exists()
