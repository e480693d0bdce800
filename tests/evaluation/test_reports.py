"""Tables and intervals as text: what every report and card is written with."""

import math

from training.evaluation.reports import excludes_zero, format_interval, markdown_table


def test_a_table_has_a_heading_a_rule_and_a_line_a_row_and_no_cell_breaks_it():
    lines = markdown_table(["task", "a|b"], [["cancer", 0.5], ["x|y", ""]])
    assert lines == ["| task | a/b |", "|---|---|", "| cancer | 0.5 |", "| x/y |  |"]


def test_an_interval_has_three_digits_a_sign_where_it_is_a_difference_and_a_dash_where_it_is_undefined():
    assert format_interval((0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert format_interval([0.5, -0.25, 0.75], signed=True) == "+0.500 [-0.250, +0.750]"
    assert format_interval([None, 0.25, math.nan]) == "- [0.250, -]"


def test_an_interval_excludes_zero_where_both_ends_lie_on_one_side():
    assert excludes_zero((0.2, 0.1, 0.3)) and excludes_zero((-0.2, -0.3, -0.1))
    assert not excludes_zero((0.2, 0.0, 0.3)) and not excludes_zero((0.1, -0.1, 0.3))
