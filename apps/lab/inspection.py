"""The Inspect tab: one image, two to four models side by side, and the mask again from an edited answer."""

import json
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import cv2
import gradio as gr
import matplotlib
import numpy as np

from apps.lab import views
from apps.lab.asking import Answer, Asker
from apps.lab.library import Library
from apps.lab.results import Result
from lab.data.facts import measure
from lab.data.images import ImageError, image_size, load_sample
from lab.data.reason import REASON, chosen_questions
from lab.data.scans import Scan, open_scan
from lab.data.synthetic import make_case
from lab.errors import LabError
from lab.evaluation.metrics import dice_iou
from lab.evaluation.report import contoured
from lab.model.decoding import Sampling

COLUMNS = 4
MAX_QUERY, MAX_ANSWER = 300, 4000
"""Characters."""
STREAM_SECONDS = 0.1
"""Between two looks at an answer that is written: sending one takes longer than writing a token."""
PUBLIC_PIXELS = 16_000_000
FILES = [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"]
VOLUMES = [".dcm", ".nii", ".gz"]
QUERIES = [
    "Locate and segment the polyp in this colon colonoscopy.",
    "Locate and segment the breast tumour in this breast ultrasound.",
    "Locate and segment the glioma in this brain MRI T1 contrast.",
    "Locate and segment the foot ulcer in this foot visible-light photograph.",
    "Find the lesion with the blurred margin and outline it.",
    "Segment the larger of the dark ones.",
]
HINT = "<p>Choose an image at the left, or try a synthetic one, and press Segment: each model reasons, then draws.</p>"


def opened(path: str, public: bool) -> Scan:
    """An uploaded image or volume; what is wrong with it is said with the name that the visitor gave it."""
    name = Path(path).name
    if public and not name.lower().endswith(tuple(FILES)):
        raise LabError(f"'{name}' is no image; give a PNG, JPEG or TIFF file.")
    try:
        if public and np.prod(image_size(path)) > PUBLIC_PIXELS:
            raise ImageError(f"'{path}' is over {PUBLIC_PIXELS // 1_000_000} megapixels; scale it down")
        return open_scan(path)
    except ImageError as error:
        raise LabError(str(error).replace(str(path), name)) from None


def window_of(centre: float | None, width: float | None) -> tuple[float, float] | None:
    """Least and greatest value of a window; None where its width is 0: none is chosen."""
    if centre is None or not width or not np.isfinite([centre, width]).all():
        return None
    return centre - abs(width) / 2, centre + abs(width) / 2


def sampling_of(temperature: float, seed: int | None) -> Sampling:
    """As a visitor chose; the slider's bounds let through what is no number, and an empty field is seed 0."""
    if not np.isfinite(temperature):
        raise gr.Error("Choose a temperature of 0.1 to 2.")
    return Sampling(max(0.05, temperature), seed=int(seed or 0))


def shown_of(answer: Answer, name: str, max_boxes: int, result: Result, truth, facts) -> views.Shown:
    """An answer with its scores, and with what it is compared with."""
    first = next(iter(result.shown.values()), None)
    return views.Shown(
        name=name,
        prediction=answer.prediction,
        attention=answer.attention,
        noticed=answer.noticed,
        truth=truth,
        facts=facts,
        max_boxes=max_boxes,
        other=first.prediction.mask if first else None,
        scores=views.score(answer.prediction, truth, max_boxes) if truth is not None else {},
    )


def column(shown: views.Shown, image: np.ndarray) -> tuple[str, str]:
    """HTML of an answer: its text with state and figures, and its viewer."""
    text = views.reasoning(shown.prediction.text, shown.facts)
    said = f"<h3>{shown.name}</h3>" + views.state(shown.prediction) + text + views.draft(shown.prediction)
    return said + views.figures(shown.prediction, shown.scores), views.viewer(image, shown, shown.name)


def export(result: Result, folder: Path) -> list[str]:
    """Files of a result in a folder: each model's mask (PNG, size of the image), one figure with all, and JSON."""
    answers = list(result.shown.items())  # the next may be written meanwhile
    if not answers:
        raise gr.Error("There is no answer yet; wait for it.")
    about = {"query": result.query, "record": result.record, "notice": views.NOTICE, "answers": {}}
    files = []
    for name, shown in answers:
        said = shown.prediction
        path = folder / f"{name.replace('/', '-')}_mask.png"
        cv2.imwrite(str(path), said.mask.astype(np.uint8) * 255)
        files.append(path)
        about["answers"][name] = {"text": said.text, "valid": said.answer.valid, "problem": said.answer.problem}
        about["answers"][name] |= {"boxes": said.boxes.round(1).tolist(), "scores": shown.scores}
    matplotlib.use("Agg")
    from matplotlib import pyplot

    height, width = result.image.shape[:2]
    size = 5.5 * len(answers), 5.5 * min(2, height / width) + 1.7
    figure, axes = pyplot.subplots(1, len(answers), figsize=size, squeeze=False, layout="constrained")
    for axis, (name, shown) in zip(axes[0], answers):
        axis.imshow(contoured(result.image, shown.truth, shown.prediction.mask))
        dice = f"  Dice {shown.scores['Dice']:.3f}" if shown.scores else ""
        axis.set_title(f"{name}{dice}", fontsize=10)
        axis.set(xticks=[], yticks=[], frame_on=False)
        axis.set_xlabel(textwrap.fill(shown.prediction.text, 80), loc="left", fontsize=8, parse_math=False)
    query = textwrap.fill(result.query, 70 * len(answers))
    figure.suptitle(f"{query}\nTruth, if known, green; model red.\n{views.NOTICE}", fontsize=10, parse_math=False)
    figure.savefig(folder / "figure.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    (folder / "answers.json").write_text(json.dumps(about, indent=1) + "\n")
    return [str(path) for path in (*files, folder / "figure.png", folder / "answers.json")]


def build(library: Library, public: bool) -> tuple[gr.Dropdown, gr.State, gr.Dropdown, gr.Dropdown]:
    """The tab's components, and what a link fills in: the record, that it was chosen, query and models.

    Args:
        library: Where models and records come from.
        public: Takes images of at most `PUBLIC_PIXELS` and no volumes.
    """
    results, asker = library.results, Asker(library)
    names = list(library.models())
    records = sorted(library.records, key=lambda name: ("test", "val", "train").index(library.records[name].split))

    def picked(path: str | None, record: str | None, place: int, centre: float | None, width: float | None):
        if path:
            scan = opened(path, public)
            return scan.picture(min(max(0, int(place)), scan.slices - 1), window_of(centre, width))
        if not record:
            raise gr.Error("Choose an image first.")
        return load_sample(library.record(record)).image

    def preview(before: tuple | None, *seen) -> dict:
        """The image by itself, where it is another than before; what was answered about that one goes."""
        if before == seen:
            return {last: seen}
        picture = views.viewer(picked(*seen)) if seen[0] or seen[1] else HINT
        return emptied() | {last: seen, key: "", pictures[0]: picture, edited: "", whose: gr.Radio([], value=None)}

    def emptied() -> dict:
        """All that was made of an answer."""
        blank = (*texts, *pictures, changed, old, new, multiples)
        return dict.fromkeys(blank, "") | {files: None, copied: ""}

    def choose(record: str | None, before: str | None, path: str | None):
        """The record's query, and no upload; to pass the list with the keyboard is to choose the same record again."""
        if not record or (record == before and not path):
            return gr.skip(), gr.skip(), gr.skip()
        return record, None if path else gr.skip(), library.record(record).query  # a cleared upload ends an answer

    def invent() -> tuple[str, None, str]:
        """A synthetic image with several lesions, a new one each time, and a question about one of them."""
        rng, questions = np.random.default_rng(), []
        while not questions:
            case = make_case(int(rng.integers(2**31)), REASON)
            questions = chosen_questions(case, rng, 1)
        path = library.scratch() / "synthetic.png"
        cv2.imwrite(str(path), cv2.cvtColor(case.image, cv2.COLOR_RGB2BGR))
        return str(path), None, questions[0][0]

    def look(path: str | None):
        """Which slice and window there is to choose in what was uploaded."""
        scan = opened(path, public) if path else Scan(1, lambda _: np.zeros((1, 1), np.uint8), None)
        low, high = scan.window or (0, 0)
        return (
            gr.Slider(0, max(1, scan.slices - 1), value=scan.slices // 2, visible=scan.slices > 1),
            gr.Number(round((low + high) / 2, 3), visible=scan.window is not None),
            gr.Number(round(high - low, 3), visible=scan.window is not None),
        )

    def run(
        path,
        record,
        query: str,
        chosen: list[str],
        sampled: bool,
        temperature: float,
        seed: int,
        place: int,
        centre: float | None,
        width: float | None,
    ) -> Iterator[dict]:
        """Ask each model in turn; text is streamed, then boxes and mask come."""
        if not (query or "").strip() or len(query) > MAX_QUERY:
            raise gr.Error(f"Write a query of 1 to {MAX_QUERY} characters.")
        if not 1 <= len(chosen or []) <= COLUMNS:
            raise gr.Error(f"Choose 1 to {COLUMNS} models.")
        asked = sampling_of(temperature, seed)
        sampling = asked if sampled else Sampling()
        image, truth, facts = picked(path, record, place, centre, width), None, None
        if record and not path:
            truth = load_sample(library.record(record)).mask
            facts = measure(image, truth)
        result = Result(image, query, record if truth is not None else "")
        done: dict = {}  # said again at the end of each model, for programs that read the last event alone
        begun = {  # comes with the first token: an event of its own would delay that
            **emptied(),
            key: results.add(result),
            last: (path, record, place, centre, width),
            **{picture: views.viewer(image) for picture in pictures[: len(chosen)]},
            whose: gr.Radio(chosen, value=chosen[-1]),
            edited: "",
            copied: link(result.record, query, chosen),
        }
        for number, name in enumerate(chosen):
            start, boxes = time.perf_counter(), library.model(name).config.reasoner.max_boxes
            shown_at = 0.0
            for token, said in enumerate(asker.answer(name, image, query, sampling)):
                # the first, <think>, shows nothing
                if isinstance(said, str) and token and time.perf_counter() - shown_at > STREAM_SECONDS:
                    shown_at = time.perf_counter()
                    yield begun | {texts[number]: f"<h3>{name}</h3>" + views.reasoning(said)}
                    begun = {}
            shown = shown_of(said, name, boxes, result, truth, facts)
            shown.prediction.seconds = time.perf_counter() - start
            result.shown[name], result.scenes[name] = shown, said.scene
            results.trim()
            said, seen = column(shown, image)
            done |= {texts[number]: said, pictures[number]: seen, edited: shown.prediction.text}
            yield begun | done
            begun = {}

    def text_of(key: str, name: str | None) -> str:
        shown = results.get(key).shown.get(name or "")
        return shown.prediction.text if shown else ""

    def again(key: str, name: str | None, text: str) -> tuple[str, str, str]:
        """Segment from an edited answer; nothing is generated."""
        result = results.get(key)
        if name not in result.shown:
            raise gr.Error("Choose whose answer you edited.")
        if len(text) > MAX_ANSWER:
            raise gr.Error(f"Write an answer of at most {MAX_ANSWER} characters.")
        reasoner = library.model(name).reasoner
        if bad := set(reasoner.completion_ids(text)) & set(reasoner.forbidden):
            token = reasoner.tokenizer.convert_ids_to_tokens(min(bad)).strip("<|>")  # the page would take it for HTML
            raise gr.Error(f"No answer holds the token '{token}'; take it out.")
        before = result.shown[name]
        start = time.perf_counter()
        answer = asker.again(name, result.scenes[name], text)
        after = shown_of(answer, name, before.max_boxes, result, before.truth, before.facts)
        after.prediction.seconds, after.other = time.perf_counter() - start, before.prediction.mask
        same = dice_iou(before.prediction.mask, after.prediction.mask)[0]
        areas = f"{before.prediction.mask.mean():.1%} to {after.prediction.mask.mean():.1%}"
        moved = f"<p><b>The new mask agrees with the old one to Dice {same:.3f}</b>; area {areas} of the image.</p>"
        said = views.state(after.prediction) + moved + views.changes(before.prediction.text, text)
        said += views.figures(after.prediction, after.scores)
        return said, views.viewer(result.image, before, "before"), views.viewer(result.image, after, "after the edit")

    def several(key: str, name: str | None, temperature: float, seed: int, count: int) -> str:
        """Several sampled answers of one model as small multiples."""
        result = results.get(key)
        if name not in result.scenes:
            raise gr.Error("Choose a model that has answered.")
        shown, sampling = result.shown[name], sampling_of(temperature, seed)
        cards = []
        for said in asker.several(name, result.scenes[name], int(count), sampling):
            scores = views.score(said, shown.truth, shown.max_boxes) if shown.truth is not None else {}
            picture = contoured(result.image, shown.truth, said.mask)
            dice = f"Dice {scores['Dice']:.3f}" if scores else f"area {said.mask.mean():.1%}"
            text = views.reasoning(said.text, shown.facts)
            cards.append(
                f'<div class="completion"><img src="{views.data_uri(picture)}" alt="{dice}"><b>{dice}</b>'
                f"{views.state(said)}<details><summary>answer</summary>{text}</details>"
                "</div>"
            )
        return f'<div class="completions">{"".join(cards)}</div>'

    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            kinds = "PNG, JPEG, TIFF" if public else "PNG, JPEG, TIFF, DICOM, NIfTI"
            types = FILES if public else FILES + VOLUMES
            limits = ", at most 10 MB and 16 megapixels" if public else ""
            upload = gr.File(file_types=types, type="filepath", label=f"Image ({kinds}{limits})", height=140)
            example = gr.Button("Try a synthetic image", size="sm")
            place = gr.Slider(0, 10_000, 0, step=1, label="Slice, from the feet up", visible=False, elem_id="slice")
            with gr.Row():
                centre = gr.Number(0, label="Window centre", visible=False, elem_id="centre", min_width=100)
                width = gr.Number(0, label="Window width", visible=False, elem_id="width", min_width=100)
            record = gr.Dropdown(records, value=None, label="or a record, whose truth is known", visible=bool(records))
            query = gr.Dropdown(QUERIES, value=QUERIES[0], allow_custom_value=True, label="Query")
            models = gr.Dropdown(
                names,
                value=names[:2],
                multiselect=True,
                max_choices=COLUMNS,
                label=f"Models, side by side: at most {COLUMNS}",
            )
            with gr.Accordion("Sampling", open=False):
                sampled = gr.Checkbox(False, label="Sample instead of the likeliest answer")
                temperature = gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature")
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed")
            with gr.Row():
                go, stop = gr.Button("Segment", variant="primary", elem_id="segment"), gr.Button("Stop")
            copied = gr.Textbox(
                label="Link to this view", interactive=False, buttons=["copy"], elem_id="link", visible=bool(records)
            )
        with gr.Column(scale=3):
            gr.HTML(views.toolbar([name for name in views.VIEWS if records or name != "errors"]), elem_id="toolbar")
            gr.HTML(views.legend(bool(records)))
            columns, pictures, texts = [], [], []
            with gr.Row():
                for number in range(COLUMNS):
                    with gr.Column(min_width=240, visible=number < max(1, len(models.value))) as one:
                        pictures.append(gr.HTML("" if number else HINT, elem_id=f"viewer-{number}"))
                        texts.append(gr.HTML(elem_id=f"answer-{number}"))
                    columns.append(one)
    key, last, chosen_record = gr.State(""), gr.State(), gr.State()
    with gr.Accordion("Edit an answer and segment again", open=True):
        with gr.Row():
            with gr.Column(scale=2):
                whose = gr.Radio([], label="Whose answer")
                edited = gr.Textbox(label="Reasoning, boxes and answer", lines=5, elem_id="edited")
                resegment = gr.Button("Segment again from this text", variant="primary")
                changed = gr.HTML(elem_id="changed")
            with gr.Column(scale=1, min_width=240):
                gr.Markdown("before")
                old = gr.HTML(elem_id="viewer-before")
            with gr.Column(scale=1, min_width=240):
                gr.Markdown("after")
                new = gr.HTML(elem_id="viewer-after")
    with gr.Accordion("Several samples of that model", open=False):
        with gr.Row():
            count = gr.Slider(2, 8, 4, step=1, label="Samples")
            multiply = gr.Button("Sample")
        multiples = gr.HTML(elem_id="samples")
    with gr.Accordion("Export", open=False):
        pack = gr.Button("Make files: masks, figure, JSON")
        files = gr.File(label="Files", file_count="multiple", interactive=False)

    models.change(
        lambda chosen: [gr.Column(visible=number < max(1, len(chosen))) for number in range(COLUMNS)],
        models,
        columns,
        api_visibility="private",
    )
    record.input(choose, [record, chosen_record, upload], [chosen_record, upload, query], api_visibility="private")
    upload.upload(lambda: None, None, record, api_visibility="private")
    example.click(invent, None, [upload, record, query], api_visibility="private")
    seen = [last, upload, record, place, centre, width]
    answered = [*texts, *pictures, changed, old, new, multiples, files, whose, edited, copied]
    upload.change(look, upload, [place, centre, width], api_visibility="private").then(
        preview, seen, [key, last, *answered], api_visibility="private"
    )
    gr.on(
        [record.change, place.release, centre.submit, width.submit, centre.blur, width.blur],
        preview,
        seen,
        [key, last, *answered],
        api_visibility="private",
    )
    event = go.click(
        run,
        [upload, record, query, models, sampled, temperature, seed, place, centre, width],
        [key, last, *answered],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=texts[0],
        api_name="segment",
    )
    others = [stop.click, upload.change, record.select, place.release, centre.submit, width.submit]
    gr.on(others, None, cancels=[event], api_visibility="private")  # an answer about an image that is not seen any more
    whose.input(text_of, [key, whose], edited, api_visibility="private")
    resegment.click(again, [key, whose, edited], [changed, old, new], concurrency_id="model", api_name="segment_again")
    multiply.click(
        several, [key, whose, temperature, seed, count], multiples, concurrency_id="model", api_name="sample"
    )
    copied.change(None, copied, copied, js=views.ADDRESS)
    pack.click(lambda key: export(results.get(key), library.scratch()), key, files, api_visibility="private")
    return record, chosen_record, query, models


def link(record: str | None, query: str, chosen: list[str]) -> str:
    """The address that reopens a view; an uploaded image is not kept, so that it has none."""
    if not record:
        return "an uploaded image is not kept; pick a record to get a link"
    return "?" + urlencode({"record": record, "query": query, "models": ",".join(chosen)})
