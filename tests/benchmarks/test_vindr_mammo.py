"""VinDr-Mammo: made-up annotation files of the real ones' columns, with their quirks."""

import csv

import pytest

from dataset_scripts.benchmarks.vindr_mammo import (
    BENCHMARK,
    BREAST_COLUMNS,
    BREASTS,
    CATEGORIES,
    FINDINGS,
    read_index,
)

FINDING_HEADER = (*BREAST_COLUMNS[:9], "finding_categories", "finding_birads", "xmin", "ymin", "xmax", "ymax", "split")
# study, series, image, side, view, BI-RADS, density, split; all 200 high, 100 wide
IMAGES = [
    ("s1", "a", "i1", "L", "CC", 1, "C", "training"),
    ("s1", "a", "i2", "L", "CC", 1, "C", "training"),  # two CC, no MLO
    ("s1", "b", "i3", "R", "CC", 5, "C", "training"),  # another series of the study
    ("s1", "b", "i4", "R", "MLO", 5, "C", "training"),
    ("s2", "c", "i5", "L", "CC", 2, "A", "test"),
    ("s2", "c", "i6", "L", "MLO", 2, "A", "test"),
    ("s2", "c", "i7", "R", "CC", 4, "A", "test"),
    ("s2", "c", "i8", "R", "MLO", 4, "A", "test"),
]
FINDINGS_OF = [
    *((image, ["No Finding"], "", None) for image in ("i1", "i2", "i5", "i6")),
    ("i3", ["Mass"], "BI-RADS 5", (10, 20, 30, 40)),
    ("i3", ["Mass", "Skin Thickening"], "BI-RADS 4", (-27, 50.5, 141, 241)),  # beyond the image on three sides
    ("i4", ["Asymmetry"], "BI-RADS 3", (1, 2, 3, 4)),
    ("i4", ["Focal Asymmetry"], "BI-RADS 3", (1, 2, 3, 4)),
    ("i7", ["Suspicious Calcification"], "BI-RADS 4", (0, 0, 100, 200)),
    ("i8", ["Nipple Retraction"], "", (5, 5, 6, 6)),
]


def write(folder, images=IMAGES, findings=FINDINGS_OF):
    of_image = {}
    with open(folder / BREASTS, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(BREAST_COLUMNS)
        for study, series, image, side, view, birads, density, split in images:
            breast = (study, series, image, side, view, 200, 100, f"BI-RADS {birads}", f"DENSITY {density}")
            of_image[image] = (breast, split)
            writer.writerow((*breast, split))
    with open(folder / FINDINGS, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(FINDING_HEADER)
        for image, names, birads, box in findings:
            breast, split = of_image.get(image, (("s9",) * 2 + (image, *"xxxxxx"), "test"))
            writer.writerow((*breast, str(names), birads, *(box or [""] * 4), split))
    return folder


def test_rows(tmp_path, caplog):
    with caplog.at_level("INFO"):
        index = read_index(write(tmp_path)).set_index("image_id")
    assert index["breast_id"].nunique() == 4
    assert index.loc["i1"].drop("cancer").to_dict() == {
        "patient_id": "s1", "study_id": "s1", "breast_id": "s1_L", "laterality": "L", "view": "CC", "split": "train",
        "path": "images/s1/i1.dicom", "lesion": 0, "lesion_types": [],
        "birads": 1, "density": "C", "boxes": [],
    }  # fmt: skip
    assert index["cancer"].isna().all()
    assert index.loc["i3"]["lesion_types"] == ["Mass", "Skin Thickening"] and index.loc["i3"]["lesion"] == 1
    assert index.loc["i3"]["boxes"] == [
        {"x0": 10, "y0": 20, "x1": 30, "y1": 40, "slice": -1, "label": "Mass"},
        {"x0": 0, "y0": 50.5, "x1": 100, "y1": 200, "slice": -1, "label": "Mass, Skin Thickening"},
    ]
    assert "1 boxes reached beyond the image" in caplog.text
    assert index.loc["i2"]["view"] == "CC" and list(index["split"]) == ["train"] * 4 + ["test"] * 4


def test_an_image_that_no_finding_row_names(tmp_path):
    """Nobody says that there is nothing."""
    index = read_index(write(tmp_path, findings=FINDINGS_OF[1:])).set_index("image_id")
    assert index.loc["i1", ["lesion", "lesion_types", "boxes"]].isna().all()


def test_counts(tmp_path):
    counted = {name: number for name, number in BENCHMARK.count(write(tmp_path)).items() if number}
    only = {name.removeprefix("all: "): number for name, number in counted.items() if name.startswith("all: ")}
    assert only == {
        "studies": 2, "images": 8, "breasts": 4, "BI-RADS 1": 2, "BI-RADS 2": 2, "BI-RADS 4": 2, "BI-RADS 5": 2,
        "DENSITY A": 4, "DENSITY C": 4, "finding rows with box": 6, "No Finding rows": 4, "images with a finding": 4,
        "images of Mass": 1, "images of Suspicious Calcification": 1, "Mass": 2, "Skin Thickening": 1, "Asymmetry": 1,
        "Focal Asymmetry": 1, "Suspicious Calcification": 1, "Nipple Retraction": 1,
    }  # fmt: skip
    assert {name: number for name, number in counted.items() if ":" not in name} == {
        "finding rows": 10, "finding rows of several names": 1, "finding rows without finding_birads": 5,
        "boxes beyond the image": 1, "view CC": 5, "view MLO": 3, "breasts of two CC and no MLO": 1,
        "studies of 2 or 4 series": 1,
    }  # fmt: skip
    assert counted["training: Mass"] == 2 and "test: Mass" not in counted and counted["test: DENSITY A"] == 4


def test_the_published_counts_are_whole(tmp_path):
    assert set(BENCHMARK.published) == set(BENCHMARK.count(write(tmp_path)))
    for split in ("training", "test", "all"):
        of = {
            name.removeprefix(f"{split}: "): n
            for name, n in BENCHMARK.published.items()
            if name.startswith(f"{split}: ")
        }
        assert of["images"] == 4 * of["studies"] == 2 * of["breasts"]
        assert sum(of[f"BI-RADS {level}"] for level in range(1, 6)) == of["images"]
        assert sum(of[f"DENSITY {letter}"] for letter in "ABCD") == of["images"]
        assert of["No Finding rows"] + of["images with a finding"] == of["images"]
        assert sum(of[name] for name in CATEGORIES) >= of["finding rows with box"]
        if split != "all":
            others = {name: BENCHMARK.published[f"all: {name}"] - n for name, n in of.items()}
            other = "test" if split == "training" else "training"
            assert others == {name: BENCHMARK.published[f"{other}: {name}"] for name in of}
    assert (
        BENCHMARK.published["finding rows"]
        == BENCHMARK.published["all: finding rows with box"] + BENCHMARK.published["all: No Finding rows"]
    )
    assert BENCHMARK.published["view CC"] + BENCHMARK.published["view MLO"] == BENCHMARK.published["all: images"]


def test_labels(tmp_path):
    index = read_index(write(tmp_path)).set_index("image_id")

    def label(*definition):
        return BENCHMARK.definition(*definition).label(index).dropna().to_dict()

    def positive(name):
        definition = BENCHMARK.definition("cancer", name)
        return {image for image, each in definition.label(index).dropna().items() if each == definition.classes[1]}

    assert BENCHMARK.definition("cancer").name == "birads_4_5"
    assert positive("birads_4_5") == {"i3", "i4", "i7", "i8"} and len(label("cancer", "birads_4_5")) == 8
    assert positive("birads_5") == {"i3", "i4"} and len(label("cancer", "birads_5")) == 8
    assert positive("birads_5_clear") == {"i3", "i4"}
    assert list(label("cancer", "birads_5_clear")) == ["i1", "i2", "i3", "i4", "i5", "i6"]  # 4 is unclear
    assert label("birads")["i8"] == "4" and label("density")["i8"] == "A"
    assert sum(each == "finding" for each in label("lesion").values()) == 4
    # i3 has skin thickening too, i8 none of the lexicon's lesions; two kinds of asymmetry are one
    assert label("lesion_type") == {"i4": "asymmetry", "i7": "calcification"}
    assert "PhysioNet" in BENCHMARK.no_sharing


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (("i9", ["Mass"], "", (1, 2, 3, 4)), "but .* has None for image i9"),
        (("i1", "Mass", "", (1, 2, 3, 4)), "finding_categories is 'Mass', not a list"),
        (("i1", ["Cyst"], "", (1, 2, 3, 4)), "not a list of the data set's ten findings"),
        (("i1", ["Mass", "No Finding"], "", (1, 2, 3, 4)), "not a list"),
        (("i1", ["Mass"], "", None), "row 11: xmin is '', but a finding has a box"),
        (("i1", ["Mass"], "", (101, 2, 130, 4)), "holds nothing of the image"),
        (("i1", ["Mass"], "", ("a", 2, 3, 4)), "xmin is 'a', not a number"),
    ],
)
def test_a_wrong_finding_is_named(tmp_path, finding, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_index(write(tmp_path, findings=[*FINDINGS_OF, finding]))
    assert FINDINGS in str(caught.value) and "row 11" in str(caught.value)


def test_an_image_that_stands_twice_is_named(tmp_path):
    path = write(tmp_path) / BREASTS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(ValueError, match=f"row {len(lines)}: image_id is 'i1', and so is an earlier row's"):
        read_index(path.parent)


@pytest.mark.parametrize(("old", "new"), [("BI-RADS 1", "BI-RADS 0"), ("DENSITY A", "E"), ("training", "train")])
def test_a_label_that_the_data_set_does_not_have(tmp_path, old, new):
    path = write(tmp_path) / BREASTS
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"{new}.*(not one of|but {BREASTS} has)"):
        read_index(tmp_path)
