"""Batches of patients: who stands together, in what share, and that the order depends on seed and index alone."""

from collections import Counter

import pytest

from training.pretraining.views.patients import STEPS_PER_BLOCK, PatientOrder, number_breasts


def archive(num_a=30, num_b=10):
    """Patients of two sources with both views of both breasts, as columns by volume."""
    rows = [
        (f"{source}{number}", side, view, source)
        for source, count in (("a", num_a), ("b", num_b))
        for number in range(count)
        for side, view in (("L", "CC"), ("L", "MLO"), ("R", "MLO"), ("R", "CC"))
    ]
    return tuple(list(column) for column in zip(*rows, strict=True))


def order(columns=None, seed=0, **changes) -> PatientOrder:
    settings = {"views_per_patient": 4, "patients_per_step": 6, **changes}
    return PatientOrder(seed, *(columns or archive()), **settings)


def test_a_group_is_the_four_views_of_a_patient():
    columns = archive()
    places = [order(columns)[index] for index in range(4 * 6 * 20)]
    for start in range(0, len(places), 4):
        group = places[start : start + 4]
        assert len({place.volume for place in group}) == 4 and len({place.patient for place in group}) == 1
        assert len({columns[0][place.volume] for place in group}) == 1
        assert group[0].breast == group[1].breast != group[2].breast == group[3].breast
        assert columns[1][group[0].volume] == columns[1][group[1].volume] != columns[1][group[2].volume]
        assert [columns[2][place.volume] for place in group] == ["CC", "MLO"] * 2
        assert all(place.repeat == 0 for place in group)


def test_a_step_is_of_one_source_and_sources_have_their_share():
    columns, steps = archive(), STEPS_PER_BLOCK
    grouped = order(columns)
    sources = []
    for step in range(steps):
        found = {columns[3][grouped[24 * step + 4 * slot].volume] for slot in range(6)}
        assert len(found) == 1
        sources += found
    assert Counter(sources) == {"a": steps * 3 // 4, "b": steps // 4}
    assert sources[: steps // 2].count("b") > steps // 16  # mixed, not one after the other


def test_mixed_batches_hold_both_sources():
    columns = archive()
    mixed = order(columns, single_source=False)
    assert len({columns[3][mixed[index].volume] for index in range(24)}) == 2


def test_an_epoch_shows_every_patient_once():
    columns = archive(24, 0)
    grouped = order(columns)
    for epoch in range(3):
        slots = range(24 * epoch, 24 * (epoch + 1))
        assert sorted(grouped.patient_of(slot) for slot in slots) == list(range(24))


def test_one_image_comes_again_and_says_so():
    columns = (["p", "q", "q", "q"], ["L", "L", "R", "R"], [None] * 4, ["s"] * 4)
    grouped = order(columns, patients_per_step=2)
    for index in range(0, 80, 4):
        group = [grouped[index + view] for view in range(4)]
        if columns[0][group[0].volume] == "p":
            assert [place.repeat for place in group] == [0, 1, 2, 3] and {place.volume for place in group} == {0}
        else:
            left = [place for place in group if columns[1][place.volume] == "L"]
            right = [place for place in group if columns[1][place.volume] == "R"]
            assert sorted(place.repeat for place in left) == [0, 1] and [place.repeat for place in right] == [0, 0]


def test_unknown_patients_and_sides_stand_alone():
    grouped = order(([None, None, "p", "p"], ["L", "L", None, None], [None] * 4, ["s"] * 4), patients_per_step=3)
    found = {(grouped[index].volume, grouped[index].patient, grouped[index].breast) for index in range(400)}
    assert len({patient for _, patient, _ in found}) == 3
    assert len({breast for volume, _, breast in found if volume >= 2}) == 2


def test_the_order_is_a_function_of_seed_and_index():
    first, second = order(), order()
    indices = [0, 5, 24 * 300, 24 * 300 + 1, 7]
    assert [first[index] for index in indices] == [second[index] for index in reversed(indices)][::-1]
    assert [first[index] for index in range(48)] != [order(seed=1)[index] for index in range(48)]


def test_an_odd_number_of_views_is_refused():
    with pytest.raises(ValueError, match="views_per_patient=3"):
        order(views_per_patient=3)


def test_all_images_of_a_breast_have_its_number():
    """Its 2D views and its stacks; of an unknown patient or side each volume is a breast of its own."""
    patients = ["a", "a", "a", "a", None, None, "b", "a"]
    sides = ["left", "left", "right", None, "left", "left", "left", "left"]
    sources = ["x"] * 7 + ["y"]
    numbers = number_breasts(patients, sides, sources)
    assert numbers[0] == numbers[1] and len(set(numbers)) == 7
