"""The page: an image, a query, the reasoning as it is written, boxes and mask. It grows into the lab later."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
import pandas as pd

from lab.data.images import read_image
from lab.errors import LabError
from lab.evaluation.report import contoured
from lab.model.core_seg import CoreSeg, Prediction
from lab.model.release import load_release

NOTICE = "**Research use only. Not a medical device. Do not upload patient data.**"
TITLE = "CORE-Seg: reason first, then segment"
QUERIES = (
    "Locate and segment the polyp in this colon colonoscopy.",
    "Locate and segment the breast tumour in this breast ultrasound.",
    "Locate and segment the glioma in this brain MRI T1 contrast.",
    "Locate and segment the foot ulcer in this foot visible-light photograph.",
    "Locate and segment the cyst.",
    "Find the lesion with the blurred margin and outline it.",
    "Segment the larger of the dark ones.",
)
FILES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
MAX_QUERY = 300
"""Characters."""

Boxes = list[tuple[tuple[int, int, int, int] | np.ndarray, str]]


def state(prediction: Prediction) -> str:
    """One line on what was answered; loud where there is no usable answer."""
    cost = f"{prediction.seconds:.2f} s, {prediction.tokens} tokens"
    if not prediction.has_mask:
        return f"## ⚠️ Invalid answer: {prediction.answer.problem}\n{cost}"
    if prediction.answer.says_empty:
        return f"### No such lesion found: the mask is empty\n{cost}"
    if not prediction.mask.any():
        return f"## ⚠️ Empty mask although boxes were named\n{cost}"
    return f"### {prediction.mask.mean():.1%} of the image, {len(prediction.boxes)} box(es)\n{cost}"


def annotations(image: np.ndarray, prediction: Prediction) -> tuple[np.ndarray, Boxes]:
    """What `gr.AnnotatedImage` draws: the image (H, W, 3) with the mask's contour, and the boxes."""
    boxes = [(tuple(box), f"box {n}") for n, box in enumerate(prediction.boxes.round().astype(int).tolist(), start=1)]
    return contoured(image, None, prediction.mask), boxes


def figures(release: Path) -> pd.DataFrame:
    """The release's own evaluation as a table; empty where there is none beside it."""
    path = release.parent / "evaluation" / "evaluation.json"
    if not path.is_file():
        return pd.DataFrame()
    summary = json.loads(path.read_text())
    groups = {"all": summary["overall"]} | summary["by"]["modality"]
    return pd.DataFrame([{"": name} | values for name, values in groups.items()]).drop(columns="mDice_ci")


def build(model: CoreSeg, table: pd.DataFrame, examples: list[list[str]]) -> gr.Blocks:
    """The page for one loaded model.

    Args:
        model: What answers.
        table: Figures shown below; none when empty.
        examples: Rows of image path and query.
    """

    def answer(path: str | None, query: str) -> Iterator[tuple]:
        """Stream the reasoning, then give boxes and mask."""
        if not path:
            raise gr.Error("Choose an image first.")
        if not query.strip() or len(query) > MAX_QUERY:
            raise gr.Error(f"Write a query of 1 to {MAX_QUERY} characters.")
        image = read(path)
        start, text = time.perf_counter(), ""
        for text in model.stream(image, query):
            yield plain(text), None, "Reasoning ..."
        (prediction,) = model.segment_text([image], [query], [text])
        prediction.seconds = time.perf_counter() - start
        yield plain(text), annotations(image, prediction), state(prediction)

    choices = list(dict.fromkeys([*QUERIES, *(query for _, query in examples)]))
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n{NOTICE}")
        with gr.Row():
            with gr.Column():
                # a file, not gr.Image: that would decode whatever is sent before its size is known
                image = gr.File(file_types=list(FILES), type="filepath", label="Image (PNG, JPEG, TIFF)", height=110)
                preview = gr.Image(interactive=False, format="png", height=300, label="What the model sees")
                query = gr.Dropdown(choices, value=QUERIES[0], allow_custom_value=True, label="Query")
                with gr.Row():
                    run, stop = gr.Button("Segment", variant="primary"), gr.Button("Stop")
                if examples:
                    gr.Examples(examples, [image, query], cache_examples=False)
            with gr.Column():
                reasoning = gr.Textbox(label="Reasoning and answer", lines=6)
                seen = gr.AnnotatedImage(label="Boxes and mask", format="png", height=360)
                said = gr.Markdown()
        if not table.empty:
            gr.Markdown("## How good is this model?\nOn its test split, rates in 0..1.")
            gr.Dataframe(table, interactive=False)
        image.change(lambda path: read(path) if path else None, image, preview, api_visibility="private")
        event = run.click(answer, [image, query], [reasoning, seen, said], concurrency_limit=1, api_name="segment")
        stop.click(None, cancels=[event], api_visibility="private")
    return page.queue(max_size=20)


def read(path: str) -> np.ndarray:
    """An uploaded image; what is wrong with it is said with the name that the visitor gave it."""
    try:
        return read_image(path)
    except LabError as error:
        raise gr.Error(str(error).replace(str(path), Path(path).name)) from None


def plain(text: str) -> str:
    """A completion with its tags turned into line breaks."""
    for tag, shown in (("<think>", ""), ("</think>", "\n\n"), ("<answer>", ""), ("</answer>", "")):
        text = text.replace(tag, shown)
    return text.strip()


def launch(release: Path, port: int, block: bool = True, examples: list[list[str]] | None = None) -> str:
    """Load a release and serve its page on 127.0.0.1.

    Returns:
        The address.
    """
    page = build(load_release(release), figures(release), examples or [])
    allowed = [str(Path(row[0]).parent) for row in examples or []]
    _, url, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        allowed_paths=allowed,
        show_error=True,
    )
    print(f"Open {url} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return url
