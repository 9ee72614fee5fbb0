"""Screenshots of every view of a running lab, light and dark, for the README.

core-seg app --manifest data/track/manifest.jsonl &
python docs/screenshots.py http://127.0.0.1:7860 docs/lab --record synthetic/reason-track-000000-0 --runs tiny-grpo-0
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTH, HEIGHT = 1280, 860
TALL = {"inspect": 1240, "rollouts": 1260, "leaderboard": 1240, "data": 1080, "blind": 1400}
"""Heights of the views that do not fit."""


def inspect(page: Page, address: str, record: str) -> None:
    page.goto(f"{address}&record={record}")
    page.wait_for_selector("#viewer-0 .stage")
    page.get_by_role("button", name="Segment", exact=True).click()
    page.wait_for_selector("#answer-1 .figures")
    page.click("[data-view-button=errors]")


def edited(page: Page, address: str, record: str) -> None:
    """The mask moves to where the edited box is."""
    inspect(page, address, record)
    page.click("[data-view-button=overlay]")
    text = page.input_value("#edited textarea")
    page.fill("#edited textarea", text[: text.index("[[")] + "[[20,20,45,45]]" + text[text.index("]]") + 2 :])
    page.get_by_role("button", name="Segment again from this text").click()
    page.wait_for_selector("#changed .figures")
    page.locator("#edited").scroll_into_view_if_needed()
    page.mouse.wheel(0, 600)


def rewards(page: Page, address: str, runs: str) -> None:
    page.goto(f"{address}&runs={runs}")
    page.wait_for_selector("#curves .main-svg")


def tab(page: Page, address: str, name: str, ready: str) -> None:
    page.goto(address)
    page.get_by_role("tab", name=name).click()
    if name == "Rollouts":
        page.get_by_label("Run", exact=True).click()
        page.get_by_role("option").first.click()
    if name == "Blind":
        page.get_by_role("button", name="Next pair").click()
    page.wait_for_selector(ready)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="Of the lab, such as http://127.0.0.1:7860")
    parser.add_argument("folder", type=Path, help="For the PNG files.")
    parser.add_argument("--record", required=True, help="Id of a record for Inspect.")
    parser.add_argument("--runs", default="", help="Names of runs for Rewards, with commas between.")
    parser.add_argument("--views", nargs="+", help="Take these alone, such as inspect edit.")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    shots = {
        "inspect": lambda page, address: inspect(page, address, given.record),
        "edit": lambda page, address: edited(page, address, given.record),
        "rewards": lambda page, address: rewards(page, address, given.runs),
        "rollouts": lambda page, address: tab(page, address, "Rollouts", "#rollout-groups .completion"),
        "leaderboard": lambda page, address: tab(page, address, "Leaderboard", "#scatter .point"),
        "blind": lambda page, address: tab(page, address, "Blind", "#blind-right .stage"),
        "data": lambda page, address: tab(page, address, "Data", "#data-image .stage"),
    }
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        for theme in ("light", "dark"):
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.set_default_timeout(60_000)
            for name in given.views or shots:
                page.set_viewport_size({"width": WIDTH, "height": TALL.get(name, HEIGHT)})
                shots[name](page, f"{given.address}/?__theme={theme}")
                page.wait_for_timeout(2500)
                page.screenshot(path=given.folder / f"{name}_{theme}.png")
                print(given.folder / f"{name}_{theme}.png")
        browser.close()


if __name__ == "__main__":
    main()
