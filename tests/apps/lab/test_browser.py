"""The lab in a real browser, on runs that are trained here. Without these a click could do nothing at all."""

import base64
import io
import json
import re
import shutil

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

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


def test_an_answer_goes_with_its_image_and_stays_with_it(page, lab):
    """Else the mask and the words of one image would be read as those of another."""
    segmented(page, lab)
    page.get_by_label("or a record, whose truth is known").click()
    page.keyboard.press("Escape")
    page.get_by_label("Query").click()
    page.wait_for_timeout(1000)
    assert page.locator("#viewer-0 .layer.overlay").count() and "Dice" in page.text_content("#answer-0")
    page.get_by_role("button", name="Segment again from this text").click()
    page.wait_for_selector("#viewer-after .layer.overlay", state="attached")
    before = pixels(page)
    page.get_by_role("button", name="Try a synthetic image").click()
    page.wait_for_function("!document.querySelector('#answer-0')?.textContent.trim()")
    page.wait_for_selector("#viewer-0 .stage")
    assert not np.array_equal(pixels(page), before) and not page.locator("#viewer-1 .stage").count()
    assert not page.locator("#changed .figures, #viewer-after .stage").count()
    assert page.input_value("#edited textarea") == ""
    page.get_by_role("button", name="Segment again from this text").click()
    page.get_by_text("Nothing was segmented yet").wait_for()
    page.get_by_role("button", name="Segment", exact=True).click()
    page.wait_for_function("document.querySelector('#answer-0')?.textContent.length > 20")  # streams
    page.get_by_role("button", name="Try a synthetic image").click()
    page.wait_for_function("!document.querySelector('#answer-0')?.textContent.trim()")
    page.wait_for_timeout(2000)
    assert not page.locator("#answer-0 .figures, #viewer-0 .layer.overlay, #viewer-1 .stage").count()


def test_one_click_gives_the_curves_that_a_link_names(page, lab, tmp_path):
    page.goto(f"{lab[0]}?runs=run-0,run-1&metrics=kl,reward")
    page.wait_for_selector("#curves .main-svg")
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").first.click()
    download.value.save_as(tmp_path / "curves.csv")
    curves = pd.read_csv(tmp_path / "curves.csv")
    assert list(curves.columns) == ["step", "time", "kl", "reward", "run"] and set(curves.run) == {"run-0", "run-1"}


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
    page.goto(address)
    page.wait_for_selector("#viewer-0 .stage")
    query = page.get_by_label("Query").input_value()
    assert query and query.replace(" ", "+") in address.replace("%2C", ",")
    assert page.get_by_text("of what this link names").count() == 0


def test_a_link_to_what_is_not_here_says_so(page, lab):
    """Else a colleague would compare other models than those of the link."""
    page.goto(f"{lab[0]}?models=tiny-sft,another&record=gone")
    page.get_by_text("2 of what this link names").wait_for()


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


def pixels(page):
    """What the first viewer shows, (H, W, 3)."""
    encoded = page.get_attribute("#viewer-0 .stage img", "src").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def shown(page, colour):
    """Wait until the first viewer's upper left pixel is of this grey."""
    for _ in range(100):
        if page.locator("#viewer-0 .stage img").count() and abs(int(pixels(page)[0, 0, 0]) - colour) <= 2:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{pixels(page)[0, 0]} is not {colour}")


def test_a_volume_is_leafed_through_and_a_window_is_chosen(page, lab, tmp_path):
    volume = np.zeros((32, 24, 5), np.int16)
    volume[..., :] = np.arange(5) * 100  # Hounsfield units by slice
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "ct.nii.gz")
    page.goto(lab[0])
    page.set_input_files("input[type=file]", tmp_path / "ct.nii.gz")
    page.wait_for_selector("#slice input[type=number]")
    for box, value in (("#centre", "200"), ("#width", "400")):
        page.fill(f"{box} input", value)
        page.press(f"{box} input", "Enter")
    for place, grey in ((4, 255), (1, 64)):
        page.fill("#slice input[type=number]", str(place))
        page.press("#slice input[type=number]", "Tab")
        shown(page, grey)
    page.get_by_role("button", name="Segment", exact=True).click()
    page.wait_for_selector("#answer-1 .figures")
    assert pixels(page).shape[:2] == (24, 32)
    Image.fromarray(np.full((20, 20), 500, np.uint16)).save(tmp_path / "deep.png")
    page.goto(lab[0])
    page.set_input_files("input[type=file]", tmp_path / "deep.png")
    page.wait_for_selector("#centre input")
    assert not page.locator("#slice input[type=number]").is_visible()
    for box, value in (("#centre", "500"), ("#width", "1000")):
        page.fill(f"{box} input", value)
        page.press(f"{box} input", "Enter")
    shown(page, 128)


def test_stop_ends_an_answer_and_frees_the_model(page, lab):
    record = json.loads((lab[1] / "data" / "manifest.jsonl").read_text().splitlines()[0])
    page.goto(f"{lab[0]}?record={record['id']}")
    page.wait_for_selector("#viewer-0 .stage")
    page.get_by_role("button", name="Segment", exact=True).click()
    page.wait_for_function("document.querySelector('#answer-0')?.textContent.length > 20")  # streams
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(1500)
    assert not page.locator("#answer-1 .figures").count()
    segmented(page, lab)  # the one slot is free again


def test_a_visitor_without_a_mouse_gets_a_mask_and_changes_the_view(page, lab):
    record = json.loads((lab[1] / "data" / "manifest.jsonl").read_text().splitlines()[0])
    page.goto(f"{lab[0]}?record={record['id']}")
    page.wait_for_selector("#viewer-0 .stage")

    def tab_to(wanted):
        for _ in range(120):
            page.keyboard.press("Tab")
            if page.evaluate(
                f"document.activeElement.matches({wanted!r}) || document.activeElement.innerText == {wanted!r}"
            ):
                return
        raise AssertionError(f"{wanted} cannot be reached by the keyboard")

    page.get_by_label("Query").fill("Where is the cyst?")
    page.get_by_label("or a record, whose truth is known").focus()
    tab_to("Segment")
    page.wait_for_timeout(1000)
    assert page.get_by_label("Query").input_value() == "Where is the cyst?"  # passing the list chooses nothing
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer-1 .figures")
    tab_to("[data-view-button=errors]")
    page.keyboard.press("Enter")
    assert visible(page, "errors")
    tab_to("#viewer-0 .stage")
    before = transforms(page)
    page.keyboard.press("+")
    page.wait_for_timeout(300)
    one, other = transforms(page)
    assert one != before[0] and one == other


def test_a_run_that_has_only_begun_is_listed_and_harms_nothing(page, lab):
    address, folder = lab
    begun = folder / "runs" / "begun"
    (begun / "rollouts").mkdir(parents=True)
    (begun / "metrics.jsonl").write_text('{"step": 0, "rew')
    try:
        page.goto(f"{address}?runs=run-0,begun")
        page.wait_for_selector("#curves .main-svg")
        page.get_by_role("tab", name="Rollouts").click()
        page.get_by_label("Run", exact=True).click()
        page.get_by_role("option", name="run-1").click()
        page.wait_for_selector("#rollout-groups .completion")
        assert not page.locator(".toast-body.error").count()
    finally:
        shutil.rmtree(begun)
