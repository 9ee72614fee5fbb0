"""What a pretrained language model adds: the reason track asked in words that no template of the lab holds.

    python -m benchmarks.free_form --manifest data/track/manifest.jsonl --models '[releases/core-seg-tiny-sft, mine]'

Each record is asked twice, as it stands and in other words for the same; the loss of Dice from one to the other, image
by image, is what a model does not understand. Names of diseases stay, and only how they are asked for changes.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd

from benchmarks import run
from lab.data.manifest import read_manifest
from lab.data.reason import LEADS
from lab.data.sample import evenly
from lab.errors import LabError
from lab.evaluation.compare import compare
from lab.evaluation.report import machine
from lab.evaluation.run import evaluate
from lab.model.release import load_model

ASKED = (
    "Could you trace {} for me?",
    "I would like to have {} contoured, please.",
    "Can you show me {}?",
    "Please mark {} with a mask.",
)
WORDS = {
    "lesion with the blurred margin": ("the spot whose edge is fuzzy", "the patch that fades into what surrounds it"),
    "lesion with the sharp margin": ("the spot that is crisply bordered", "the patch with a clear-cut edge"),
    "round lesion": ("the spot shaped like a ball", "the circular patch"),
    "lesion with the irregular outline": ("the spot that is jagged all around", "the ragged patch"),
    "dark lesion": ("the spot that looks nearly black", "the dimmest patch"),
    "bright lesion": ("the spot that looks pale", "the patch that shines"),
    "largest lesion": ("the biggest abnormality", "whichever spot takes up the most room"),
    "smallest lesion": ("the tiniest abnormality", "whichever spot takes up the least room"),
    "lesion furthest to the left": ("whichever spot is nearest to the left-hand edge", "the leftmost abnormality"),
    "lesion furthest to the right": ("whichever spot is nearest to the right-hand edge", "the rightmost abnormality"),
    "larger of the dark ones": ("the bigger one of both black spots", "of the dim patches, the one with more area"),
    "smaller of the dark ones": ("the tinier one of both black spots", "of the dim patches, the one with less area"),
    "larger of the bright ones": (
        "the bigger one of both pale spots",
        "of the shining patches, the one with more area",
    ),
    "smaller of the bright ones": (
        "the tinier one of both pale spots",
        "of the shining patches, the one with less area",
    ),
}


def in_other_words(query: str, place: int) -> str:
    """A query of the reason track as a person might put it.

    Args:
        query: As the lab's templates have it.
        place: Of the record; which of the ways to say it is taken.

    Raises:
        LabError: For a query of another kind.
    """
    for lead in LEADS:
        before, _, after = lead.partition("{}")
        if found := re.fullmatch(re.escape(before) + "the (.+)" + re.escape(after), query):
            what = found[1]
            said = WORDS[what][place % 2] if what in WORDS else f"any {what} that there is"
            return ASKED[place // 2 % len(ASKED)].format(said)
    raise LabError(
        f"query '{query}' is none of the reason track's; give a manifest that core-seg data synthesize wrote"
    )


def main(manifest: Path, models: list[Path], limit: int = 0, out: Path | None = None) -> None:
    """Ask and print; with `out` also write the JSON.

    Args:
        manifest: Of the reason track.
        models: Releases or checkpoints of stage 1 or 2.
        limit: Ask this many, evenly spread; 0 asks all.
        out: JSON to write.
    """
    records = evenly([record for record in read_manifest(manifest) if record.split == "test"], limit)
    free = [replace(record, query=in_other_words(record.query, place)) for place, record in enumerate(records)]
    told = machine() | {"manifest": manifest.as_posix(), "models": {}}
    for model in models:
        core_seg = load_model(model)
        most = core_seg.config.reasoner.max_boxes
        plain, other = (evaluate(core_seg.predict, asked, most) for asked in (records, free))
        names = ~plain["query"].str.contains("|".join(WORDS))
        told["models"][str(model)] = {
            "all": both(plain, other),
            "by name": both(plain[names], other[names]),
            "by what it looks like": both(plain[~names], other[~names]),
        }
        print(model, json.dumps(told["models"][str(model)]))
        if out:
            out.write_text(json.dumps(told, indent=1) + "\n")


def both(plain: pd.DataFrame, other: pd.DataFrame) -> dict:
    """mDice and failure rate of both ways to ask, and the difference of Dice with its interval."""
    if plain.empty:
        return {"n": 0}
    compared = compare(plain, [other])
    figures = {"mDice": compared["base"]["mDice"], "failure_rate": compared["base"]["failure_rate"]}
    free = {key: compared["mean"][key] for key in ("mDice", "failure_rate", "gain", "gain_ci", "p")}
    return {"n": len(plain), "as_trained": figures, "in_other_words": free}


if __name__ == "__main__":
    run(main, as_positional=False)
