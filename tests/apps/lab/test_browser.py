"""The lab in a real browser, on runs that are trained here. Without these a click could do nothing at all."""

import json
import re

import pytest

from tests.apps.lab.conftest import CHROMIUM

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt-get install chromium")
ANSWER = "<think> A dark area. </think><answer>The cyst are located at [[{}]]. The mask is <seg>.</answer>"


@pytest.fixture
def page(browser, lab):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.set_default_timeout(20_000)
    yield page
    page.close()
    assert not wrong


def segmented(page, lab):
    """The first record of the manifest, answered by two models."""
    address, folder = lab
    record = json.loads((folder / "data" / "manifest.jsonl").read_text().splitlines()[0])
    page.goto(f"{address}?record={record['id']}")
    page.wait_for_selector("#viewer-0 .stage")  # the link has been read
    page.get_by_role("button", name="Segment", exact=True).click()
    page.wait_for_selector("#answer-1 .figures")
    return record


def visible(page, layer):
    return page.evaluate(f"getComputedStyle(document.querySelector('#viewer-0 .layer.{layer}')).display") == "block"


def transforms(page):
    return page.evaluate(
        "['#viewer-0', '#viewer-1'].map(id => getComputedStyle(document.querySelector(id + ' .pan')).transform)"
    )


def test_two_models_answer_side_by_side_and_one_click_changes_the_view(page, lab):
    record = segmented(page, lab)
    assert "tiny-sft" in page.text_content("#answer-0") and "tiny-grpo" in page.text_content("#answer-1")
    assert "Dice" in page.text_content("#answer-0") and "INVALID ANSWER" in page.text_content("#answer-0")
    assert page.get_by_label("Query").input_value() == record["query"]
    for view in ("contour", "errors", "difference", "attention", "overlay"):
        page.click(f"[data-view-button={view}]")
        shown = "#viewer-1" if view == "difference" else "#viewer-0"
        others = {"errors", "attention", "overlay"} - {view}
        style = f"getComputedStyle(document.querySelector('{shown} .layer.{view}')).display"
        assert page.evaluate(style) == "block" and not any(visible(page, other) for other in others)
    assert "Not a medical device" in page.text_content("body")


def test_zooming_in_one_column_moves_the_other(page, lab):
    segmented(page, lab)
    before = transforms(page)
    page.hover("#viewer-0 .stage")
    page.mouse.wheel(0, -400)
    page.wait_for_function("getComputedStyle(document.querySelector('#viewer-1 .pan')).transform.includes('2.7')")
    one, other = transforms(page)
    assert before[0] != one and re.split("[(,]", one)[1] == re.split("[(,]", other)[1]
    page.click("[data-reset]")
    assert transforms(page) == before


def test_an_edited_answer_gives_another_mask(page, lab):
    segmented(page, lab)
    seen = []
    for box in ("5,5,30,30", "60,60,95,95"):
        page.fill("#edited textarea", ANSWER.format(box))
        page.get_by_role("button", name="Segment again from this text").click()
        page.wait_for_function(f"document.querySelector('#changed')?.textContent.includes('[[{box}]]')")
        page.wait_for_selector("#viewer-after .layer.overlay", state="attached")
        seen.append(page.get_attribute("#viewer-after .layer.overlay", "src"))
    assert seen[0] != seen[1]
    assert page.locator("#changed ins").count() and "agrees with the old one" in page.text_content("#changed")


def test_curves_of_two_runs_one_of_which_is_still_written(page, lab):
    address, folder = lab
    page.goto(f"{address}?runs=run-0,run-1")
    page.wait_for_selector("#curves .main-svg")
    traces = "document.querySelector('#curves .js-plotly-plot')._fullData.map(trace => trace.x.length)"
    page.wait_for_function(f"{traces}.length >= 4")
    path = folder / "runs" / "run-1" / "metrics.jsonl"
    before = path.read_text()
    last = [json.loads(line) for line in before.splitlines() if "reward" in line][-1]
    with path.open("a") as file:
        file.write(json.dumps(last | {"step": last["step"] + 1}) + "\n" + '{"step": 9, "rew')  # within a line
    try:
        page.wait_for_function(f"Math.max(...{traces}) >= 4", timeout=30_000)
    finally:
        path.write_text(before)


def test_a_group_of_completions_and_a_followed_image(page, lab):
    page.goto(lab[0])
    page.get_by_role("tab", name="Rollouts").click()
    page.get_by_label("Run", exact=True).click()
    page.get_by_role("option", name="run-0").click()
    page.wait_for_selector("#rollout-groups .completion")
    assert page.locator("#rollout-groups .group").count() == 2
    assert page.locator("#rollout-groups .completion").count() == 2 * 8
    page.wait_for_function("document.querySelector('#followed-text')?.textContent.includes('step 0:')")
    page.fill("#follow input[type=number]", "3")
    page.press("#follow input[type=number]", "Enter")
    page.wait_for_function("document.querySelector('#followed-text').textContent.includes('step 3:')")


def test_a_link_reopens_the_view(page, lab):
    segmented(page, lab)
    address = page.input_value("#link textarea")
    page.goto(lab[0] + address)
    page.wait_for_selector("#viewer-0 .stage")
    query = page.get_by_label("Query").input_value()
    assert query and query.replace(" ", "+") in address.replace("%2C", ",")


def test_a_blind_vote_reveals_the_names_and_is_kept(page, lab):
    page.goto(lab[0])
    page.get_by_role("tab", name="Blind").click()
    page.get_by_role("button", name="Next pair").click()
    page.wait_for_selector("#blind-right .stage")
    assert "tiny-" not in page.text_content("#blind-left") + page.text_content("#revealed")
    page.get_by_role("button", name="Left is better").click()
    page.wait_for_function("document.querySelector('#revealed').textContent.includes('Left was')")
    (vote,) = (lab[1] / "runs" / "votes.jsonl").read_text().splitlines()
    vote = json.loads(vote)
    assert vote["vote"] == "left" and {vote["left"], vote["right"]} == {"tiny-sft", "tiny-grpo"}


def test_evaluations_are_ranked_and_a_point_opens_its_image(page, lab):
    page.goto(lab[0])
    page.get_by_role("tab", name="Leaderboard").click()
    page.wait_for_selector("#scatter .point")
    assert page.locator("#leaderboard").get_by_text("tiny-grpo").count()
    page.hover("#scatter .point >> nth=0", force=True)
    page.wait_for_function("document.querySelector('#scatter .js-plotly-plot')._hoverdata?.length > 0")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_url("**/?record=*")
    page.wait_for_selector("#viewer-0 .stage")


def test_records_are_browsed(page, lab):
    page.goto(lab[0])
    page.get_by_role("tab", name="Data").click()
    page.wait_for_selector("#data-image .stage")
    before = page.text_content("#data-facts")
    page.fill("#record-slider input[type=number]", "1")
    page.press("#record-slider input[type=number]", "Enter")
    page.wait_for_function("before => document.querySelector('#data-facts').textContent !== before", arg=before)
