"""Without these a benchmark could change under its users, leak into training, or be solved without the query."""

import json
import time

import numpy as np
import pytest

from lab.data.check import check_manifest
from lab.data.reason import REASON, chosen_questions, none_here, queries, write_reason
from lab.data.synthetic import TRACK_BLOCK, case_seeds, make_case, write_plain
from lab.errors import LabError

LOOKS = ("ultrasound", "dermoscopy", "mri", "ct", "colonoscopy", "photograph")


@pytest.mark.parametrize("look", LOOKS)
def test_the_same_seed_gives_the_same_case(look):
    first, second = make_case(7, look=look), make_case(7, look=look)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.image.shape == (256, 256, 3) and first.image.dtype == np.uint8
    assert not np.array_equal(first.image, make_case(8, look=look).image)


def test_cases_are_made_fast_enough_to_be_written_while_one_waits():
    start = time.process_time()
    for seed in range(30):
        make_case(seed)
    print(f"{30 / (time.process_time() - start):.0f} images/s per core")  # measured: about 70; not asserted


def test_a_written_set_reads_back_without_a_problem(tmp_path):
    plain, reason = write_plain(tmp_path / "p", 12, seed=3), write_reason(tmp_path / "r", 6, seed=3)
    for path in (plain, reason):
        assert check_manifest(path, workers=1).problems == []
    lines = [json.loads(line) for line in reason.read_text().splitlines()]
    assert len({line["image"] for line in lines}) == 6 and len(lines) >= 12


def test_each_question_means_some_but_not_all_lesions():
    asked = 0
    for seed in range(20):
        case = make_case(seed, REASON)
        everything = np.any([lesion.mask for lesion in case.lesions], axis=0)
        for _, mask, name in queries(case, np.random.default_rng(0)):
            asked += 1
            assert mask.any() and (mask <= everything).all() and mask.sum() < everything.sum() and name != "none"
    assert asked > 40


def test_the_first_two_questions_have_different_answers_so_that_a_model_without_language_fails():
    overlaps = []
    for seed in range(30):
        found = chosen_questions(make_case(seed, REASON), np.random.default_rng(0), 2)
        if found:
            first, second = (mask for _, mask, _ in found)
            overlaps.append((first & second).sum() / min(first.sum(), second.sum()))
    assert len(overlaps) > 15 and max(overlaps) < 0.1


def test_a_question_for_what_is_not_there_names_a_kind_that_is_not_there():
    for seed in range(10):
        case = make_case(seed, REASON)
        for query, mask, name in none_here(case, np.random.default_rng(0)):
            assert not mask.any() and name == "none"
            assert not any(f"the {lesion.kind}" in query for lesion in case.lesions)


def test_no_training_set_can_hold_a_case_of_the_benchmark():
    with pytest.raises(LabError, match="kept for benchmarks"):
        case_seeds(TRACK_BLOCK, 10)
    assert set(case_seeds(1, 100)).isdisjoint(case_seeds(2, 100))
