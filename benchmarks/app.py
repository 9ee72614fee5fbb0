"""How long a visitor of the lab waits, in a real browser, and what a crowd costs.

    python -m benchmarks.app releases data/track/manifest.jsonl

Opens the page and asks one model about a record, `times` times: seconds to the first useful paint (the button that asks
is there), from the click to the first token, and to the mask. Then `visitors` ask at once for a minute through the API.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import psutil
from gradio_client import Client
from playwright.sync_api import Page, sync_playwright

from benchmarks import run
from lab.data.manifest import read_manifest
from lab.evaluation.report import machine

WATCH = """() => {
  const seen = {}, columns = { first_token: "#answer-0 .reasoning *", mask: "#answer-0 .figures" };
  document.addEventListener("click", () => { seen.click = performance.now(); }, { capture: true, once: true });
  new MutationObserver(() => {
    for (const [name, place] of Object.entries(columns))
      if (!(name in seen) && document.querySelector(place)) seen[name] = performance.now();
  }).observe(document.body, { childList: true, subtree: true });
  const since = (name) => (seen[name] - seen.click) / 1000;
  window.waited = () => ({ first_token: since("first_token"), mask: since("mask") });
}"""
"""The page itself notes when the click comes and what it shows then."""


def visit(page: Page, address: str, record: str, model: str) -> dict[str, float]:
    """Seconds that one visitor waits."""
    start = time.perf_counter()
    page.goto(f"{address}?{urlencode({'record': record, 'models': model})}")
    button = page.get_by_role("button", name="Segment", exact=True)
    button.wait_for()
    painted = time.perf_counter()
    page.wait_for_selector("#viewer-0 .stage")
    page.wait_for_timeout(1000)  # the visitor looks
    page.evaluate(WATCH)
    button.click()
    page.wait_for_selector("#answer-0 .figures")
    page.wait_for_timeout(300)
    waits = page.evaluate("window.waited()")
    page.close()
    return {"first_paint": painted - start, **waits}


def crowd(address: str, records: list[str], model: str, visitors: int, seconds: float) -> int:
    """Answers that so many visitors got."""
    end = time.monotonic() + seconds

    def ask(record: str) -> int:
        client, count = Client(address, verbose=False), 0
        while time.monotonic() < end:
            client.predict(None, record, "Segment the lesion.", [model], False, 1.0, 0, api_name="/segment")
            count += 1
        return count

    with ThreadPoolExecutor(visitors) as pool:
        return sum(pool.map(ask, records))


def main(
    releases: Path, manifest: Path, times: int = 7, visitors: int = 20, seconds: float = 60, out: Path | None = None
) -> None:
    """Start the lab, measure and print; the last line is JSON.

    Args:
        releases: Folder of releases; the first one answers.
        manifest: Its first test records are asked about.
        times: Visits, of which the median and the slowest are reported.
        visitors: That ask at once.
        seconds: How long they do.
        out: The JSON is also written here.
    """
    command = [sys.executable, "-m", "lab", "app", f"--releases={releases}", f"--manifest={manifest}", "--port=0"]
    lab = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        started = time.perf_counter()
        address = next(found[1] for line in lab.stdout if (found := re.search(r"Open (\S+)", line)))
        result: dict = {"seconds": {"start": round(time.perf_counter() - started, 2)}}
        records = [record.id for record in read_manifest(manifest) if record.split == "test"]
        model = sorted(path.parent.name for path in releases.glob("*/model.safetensors"))[0]
        with sync_playwright() as playwright:
            arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
            visits = [visit(browser.new_page(), address, records[place], model) for place in range(times)]
            browser.close()
        for name in visits[0]:
            waits = [one[name] for one in visits]
            result["seconds"][name] = {"median": round(statistics.median(waits), 3), "slowest": round(max(waits), 3)}
        memory = psutil.Process(lab.pid).memory_info
        before = memory().rss
        answers = crowd(address, records[:visitors], model, visitors, seconds)
        result["crowd"] = {"visitors": visitors, "seconds": seconds, "answers": answers}
        result["crowd"] |= {"mb_before": before // 1_000_000, "mb_after": memory().rss // 1_000_000}
    finally:
        lab.terminate()
        lab.wait()
    result |= {"model": model, "machine": machine()}
    for name, waits in result["seconds"].items():
        print(f"{name:12} {waits}")
    print(f"crowd        {result['crowd']}")
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
