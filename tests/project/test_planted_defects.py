"""The list of planted defects must keep up with the code: each one's text stands in the model's files, once."""

import pytest

from tests.planted_defects import DEFECTS, Defect, place_of


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_the_text_to_replace_is_there_once(defect: Defect) -> None:
    assert place_of(defect).read_text("utf-8").count(defect.old) == 1
    assert defect.old != defect.new


def test_names_are_unique() -> None:
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
