"""RSNA: a made-up train.csv of the real one's columns; sites, assessments and densities as they are in it."""

import pytest

from dataset_scripts.benchmarks.rsna import BENCHMARK, COLUMNS, read_index

# site, patient, image, side, view, age, cancer, biopsy, invasive, BIRADS, implant, density, machine, difficult
ROWS = """
1,10,101,L,CC,50,1,1,1,0,0,B,49,False
1,10,102,L,MLO,50,1,1,1,0,0,B,49,False
1,10,103,R,CC,50,0,0,0,1,0,B,49,False
1,10,104,R,MLO,50,0,0,0,1,0,B,49,False
1,11,111,L,CC,,0,0,0,2.0,1,,49,False
1,11,112,L,MLO,,0,0,0,2.0,1,,49,False
1,11,113,R,CC,,0,0,0,2.0,1,,49,False
1,11,114,R,AT,,0,0,0,2.0,1,,49,False
2,20,201,L,CC,61,0,1,0,0,0,,21,True
2,20,202,L,MLO,61,0,1,0,0,0,,21,True
2,20,203,R,CC,61,1,1,0,,0,,21,False
2,20,204,R,MLO,61,1,1,0,,0,,21,False
2,20,205,R,LMO,61,1,1,0,,0,,21,False
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.csv").write_text(",".join(COLUMNS) + ROWS)
    return tmp_path


def change(folder, old, new):
    text = (folder / "train.csv").read_text()
    assert old in text
    (folder / "train.csv").write_text(text.replace(old, new))


def test_rows(folder):
    index = read_index(folder).set_index("image_id")
    assert len(index) == 13 and index["breast_id"].nunique() == 6 and index["patient_id"].nunique() == 3
    first, axillary = index.loc["101"], index.loc["114"]
    assert first["path"] == "train_images/10/101.dcm"
    assert (first["breast_id"], first["laterality"], first["view"]) == ("10_L", "L", "CC")
    assert (first["cancer"], first["birads"], first["density"]) == (1, 0, "B")
    assert (axillary["view"], axillary["birads"]) == ("AT", 2)
    for column in ("split", "lesion", "lesion_types", "boxes"):
        assert index[column].isna().all()  # no official split, no lesion labels


def test_counts(folder):
    counted = {name: number for name, number in BENCHMARK.count(folder).items() if number}
    assert counted == {
        "images": 13, "patients": 3, "breasts": 6, "fewest images of a patient": 4, "most images of a patient": 5,
        "site 1": 8, "site 2": 5, "patients of site 1": 2, "patients of site 2": 1,
        "laterality L": 6, "laterality R": 7, "view CC": 6, "view MLO": 5, "view AT": 1, "view LMO": 1,
        "cancer 0": 8, "cancer 1": 5, "cancer 1 of site 1": 2, "cancer 1 of site 2": 3,
        "cancer 1, breasts": 2, "cancer 1, patients": 2, "biopsy 1": 7, "invasive 1": 2, "implant 1": 4,
        "difficult_negative_case True": 2, "age missing": 4,
        "BIRADS 0": 4, "BIRADS 1": 2, "BIRADS 2": 4, "BIRADS missing": 3,
        "density B": 4, "density missing": 9, "density missing of site 1": 4,
        "patients of density B": 1, "patients of density missing": 2,
        "machine 49 of site 1": 8, "machine 21 of site 2": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values", "total"),
    [
        ("site {}", (1, 2), "images"),
        ("patients of site {}", (1, 2), "patients"),
        ("laterality {}", "LR", "images"),
        ("view {}", ("CC", "MLO", "AT", "LM", "ML", "LMO"), "images"),
        ("cancer {}", (0, 1), "images"),
        ("cancer 1 of site {}", (1, 2), "cancer 1"),
        ("BIRADS {}", (0, 1, 2, "missing"), "images"),
        ("density {}", ("A", "B", "C", "D", "missing"), "images"),
        ("patients of density {}", ("A", "B", "C", "D", "missing"), "patients"),
        ("machine {} of site 1", (49, 93, 216, 210, 170, 190, 197), "site 1"),
        ("machine {} of site 2", (48, 29, 21), "site 2"),
    ],
)
def test_the_published_counts_are_whole(name, values, total):
    assert sum(BENCHMARK.published[name.format(value)] for value in values) == BENCHMARK.published[total]


def test_all_that_is_published_is_counted(folder):
    assert set(BENCHMARK.published) <= set(BENCHMARK.count(folder))


def test_labels(folder):
    index = read_index(folder).set_index("image_id")

    def label(*definition):
        return BENCHMARK.definition(*definition).label(index).dropna().to_dict()

    cancer = label("cancer")
    assert [image for image in cancer if cancer[image] == "cancer"] == ["101", "102", "203", "204", "205"]
    assert len(cancer) == 13
    of_site_1 = {"101": "0", "102": "0", "103": "1", "104": "1"}
    assert label("birads") == of_site_1  # site 2 says 0 or nothing; an image without a density is not known to be of 1
    assert label("birads", "all") == of_site_1 | dict.fromkeys(["111", "112", "113", "114"], "2") | {
        "201": "0",
        "202": "0",
    }
    assert BENCHMARK.definition("birads").classes == ("1", "2", "0")  # recalled is the highest
    assert label("density") == dict.fromkeys(of_site_1, "B")
    assert label("density", "dense") == dict.fromkeys(of_site_1, "not dense")
    for task in ("lesion", "lesion_type"):
        with pytest.raises(ValueError, match="no labels for it"):
            BENCHMARK.definition(task)
    assert "rules" in BENCHMARK.no_sharing


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("laterality", "side", "no column laterality"),
        ("1,10,102,L", "1,10,102,X", "row 2: laterality is 'X'"),
        ("10,102,L,MLO,50,1", "10,102,L,MLO,50,", "row 2: cancer is ''"),
        ("10,102,L,MLO,50,1", "10,102,L,MLO,50,3", "image 102: cancer is 3"),
        ("10,102,", "10,101,", "image_id '101' occurs more than once"),
        ("1,11,111,L", "1,11,,L", "row 5: image_id"),
        (",0,0,B,49,False\n1,10,102", ",0,0,E,49,False\n1,10,102", "image 101: density is E"),
    ],
)
def test_what_is_wrong_is_named(folder, old, new, words):
    change(folder, old, new)
    with pytest.raises(ValueError, match=words):
        read_index(folder)


def test_without_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no train.csv; give the folder"):
        read_index(tmp_path)
