"""An answer that contradicts its own mask must lose the claim, and its boxes must be those of the mask."""

import numpy as np

from lab.data.facts import measure
from lab.data.reasoning import CLAIMS, check_claims, parse_claims, write_claims
from lab.model.answer import parse, render
from lab.model.corroboration import corroborated


def scene() -> tuple[np.ndarray, np.ndarray]:
    """A bright disc at the upper left, and its mask."""
    y, x = np.mgrid[:120, :120]
    mask = (x - 30) ** 2 + (y - 24) ** 2 < 12**2
    image = np.where(mask[..., None], 200, 60).astype(np.uint8).repeat(3, -1)
    return image, mask


def draft(**claims: str) -> str:
    facts = {name: getattr(measure(*scene()), name) for name in CLAIMS} | claims
    reasoning = " ".join(["This image shows the skin.", *write_claims(facts), "This fits melanoma."])
    return render(reasoning, "melanoma", np.array([[0.5, 0.5, 0.9, 0.9]]), 100)


def test_what_the_mask_contradicts_is_no_longer_claimed():
    image, mask = scene()
    answer = parse(corroborated(draft(location="lower right", count="many"), image, mask, 100, 5), 100)
    claims = parse_claims(answer.reasoning)
    assert answer.valid and claims.keys() == set(CLAIMS) - {"location", "count"}
    assert all(check_claims(claims, measure(image, mask)).values())
    assert answer.reasoning.startswith("This image shows the skin.") and answer.reasoning.endswith(
        "This fits melanoma."
    )


def test_an_answer_that_is_valid_stays_so_however_it_is_spaced():
    spaced = draft().replace("<answer>The melanoma are", "<answer>\n The  melanoma\nare")
    answer = parse(corroborated(spaced, *scene(), 100, 5), 100)
    assert answer.valid and answer.lesion == "melanoma"


def test_boxes_are_those_of_the_mask():
    image, mask = scene()
    answer = parse(corroborated(draft(), image, mask, 120, 5), 120)
    np.testing.assert_allclose(answer.boxes_norm * 120, [[19, 13, 42, 36]])


def test_nothing_is_left_when_all_is_contradicted_but_the_answer_stays_valid():
    image, mask = scene()
    wrong = dict(location="lower right", size="large", contrast="darker", margin="blurred", shape="irregular")
    answer = parse(corroborated(draft(count="many", **wrong), image, mask, 100, 5), 100)
    assert answer.valid and parse_claims(answer.reasoning) == {}


def test_invalid_empty_and_undrawn_answers_are_left_alone():
    image, mask = scene()
    empty = render("The skin is normal. Nothing departs.", "none", np.zeros((0, 4)), 100)
    for text, drawn in (("no idea", mask), (empty, mask), (draft(), np.zeros_like(mask))):
        assert corroborated(text, image, drawn, 100, 5) == text


def test_every_choice_of_claims_reads_back_as_it_was_written():
    facts = {name: getattr(measure(*scene()), name) for name in CLAIMS}
    for kept in range(2 ** len(CLAIMS)):
        claims = {name: facts[name] for place, name in enumerate(CLAIMS) if kept >> place & 1}
        text = " ".join(["The skin.", *write_claims(claims), "This fits melanoma."])
        assert parse_claims(text) == claims, text
