"""The model card of a release."""

from collections.abc import Iterable

from lab.model.core_seg import CoreSegConfig
from lab.model.segmenter import SegmenterConfig

HEADER = """\
---
library_name: core-seg-lab
pipeline_tag: image-segmentation
license: cc-by-nc-sa-4.0
---
# {title}

**Research use only. Not a medical device.** It is wrong often enough to matter; see its evaluation.

- Trained on: {data}
- Terms: those of the strictest source of its training data: non-commercial, share alike.
"""
CARD = """
A model of the CORE-Seg lab (after arXiv 2603.05911): it reasons, names boxes and segments the lesion that is asked for.

```
core-seg segment IMAGE --query "Locate and segment the polyp in this colon colonoscopy." --release DIR --out out/
```

- Input: one RGB image, padded to {size} px, and an English query of the form above.
- Output: `<think> reasoning </think><answer>The LESION are located at [[x1,y1,x2,y2],...]. The mask is <seg>.</answer>`
  with boxes on a grid of {grid} and the mask that {prompts}, or
  `<think> reasoning </think><answer>No such lesion is found. The mask is empty.</answer>`
- Limits: it knows the kinds of images that it was trained on, reads English alone, misses lesions of a few pixels, and
  its reasoning is of measured words (location, size, contrast, margin, shape, count), not of medical knowledge.
"""
CORROBORATED = """\
- Every answer is read again beside the mask that its draft drew: claims that the mask does not confirm are left out,
  and the boxes are those of the mask (`corroborate`).
"""
SEGMENTER_CARD = """
Stage 0 of the CORE-Seg lab (after arXiv 2603.05911): a small SAM that segments what is in a box, as MedSAM does; what
stage 1 starts from (`--model.init_args.segmenter_checkpoint DIR`).

- Input: one RGB image, padded to {size} px, and boxes. Output: their masks.
- Limits: it knows the kinds of images that it was trained on, and fills the box that it is given, right or wrong.
"""
FAILURES = """
## Where it fails

![The four cases of an evaluation with the least Dice, truth green, the model's mask red](worst.webp)
"""
ADAPTER_CARD = """
**This release holds what was trained alone.** With what it was trained from (reasoner: {reasoner}; segmenter:
{segmenter}) it becomes whole, and can be used then: `core-seg merge DIR OUT --reasoner CHECKPOINT --segmenter WEIGHTS`.
"""


def card(
    config: CoreSegConfig | SegmenterConfig,
    title: str,
    data: str,
    base: dict | None,
    evaluations: Iterable[dict],
    glance: bool = False,
    gallery: bool = False,
) -> str:
    """Markdown with the hub's front matter.

    Args:
        config: Of the model, or of stage 0's segmenter.
        title: Of the card.
        data: What the model was trained on.
        base: `reasoner` and `segmenter` that a release without their weights was trained from; None for a whole one.
        evaluations: What `core-seg evaluate` wrote of it.
        glance: `CoreSeg.draws_at_a_glance`.
        gallery: Whether the release holds a picture of its worst cases.
    """
    text = HEADER.format(title=title, data=data)
    if isinstance(config, SegmenterConfig):
        text += SEGMENTER_CARD.format(size=config.image_size)
    else:
        if glance:
            prompts = "what it found before it wrote, and the `<seg>` token, prompt"
        else:
            prompts = "its boxes prompt" if config.prompt == "boxes" else "the `<seg>` token prompts"
        text += CARD.format(size=config.segmenter.image_size, grid=config.reasoner.grid, prompts=prompts)
        text += CORROBORATED if config.corroborate else ""
    text += ADAPTER_CARD.format(**base) if base else ""
    text += "".join(map(results_table, evaluations))
    return text + (FAILURES if gallery else "")


def results_table(evaluation: dict) -> str:
    """An evaluation by source, for a card."""
    lines = [f"\n## On the {evaluation['split']} split of {evaluation['manifest']}\n"]
    lines += ["| source | n | mDice (95 %) | failure rate | box F1 | faithful claims |", "|---|---|---|---|---|---|"]
    for name, values in {"**all**": evaluation["overall"], **evaluation["by"]["source"]}.items():
        low, high = values["mDice_ci"]
        cells = [f"{values['mDice']:.3f} ({low:.3f} to {high:.3f})", f"{values['failure_rate']:.1%}"]
        cells += ["" if (v := values.get(key)) is None else f"{v:.2f}" for key in ("box_f1", "faithfulness")]
        lines.append(f"| {name} | {values['n']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
