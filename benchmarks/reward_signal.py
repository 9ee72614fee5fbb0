"""How much each reward tells the completions of a group apart, on the same sampled completions of a model.

    python -m benchmarks.reward_signal releases/core-seg-tiny-sft '[../shared/data/lesions/manifest.jsonl]'

For the detect reward at several match thresholds and for the three segment rewards: the share of groups in which all
completions earn the same (they teach nothing), the mean standard deviation within a group, and the mean rank
correlation, within a group, with the Dice of the masks. It is what the defaults of `modules.groups.Rewards` rest on.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from benchmarks import run
from lab.data.manifest import read_manifest
from lab.evaluation.report import machine
from lab.grpo.objective import teaches
from lab.grpo.rewards import detect_rewards, segment_rewards
from modules.groups import Group
from modules.grpo import Grpo

THRESHOLDS = (0.0, 0.1, 0.25, 0.5, 0.75)


def rewards_of(group: Group) -> dict[str, torch.Tensor]:
    """Every candidate reward of a scored group, (G,) each."""
    detect = partial(detect_rewards, group.answers, [group.item["boxes_norm"]] * len(group.texts))
    segment = partial(segment_rewards, group.masks, group.truth, group.has_mask)
    return {f"detect, IoU above {threshold}": detect(threshold) for threshold in THRESHOLDS} | {
        "segment: paper, GIoU of boxes": segment("paper", "boxes"),
        "segment: paper, GIoU of areas": segment("paper", "areas"),
        "segment: residual": segment("residual"),
        "segment: dice": segment("dice"),
    }


def main(model: str, manifests: list[str], split: str = "val", images: int = 128, out: Path | None = None) -> None:
    """Sample, measure and print; the last line is JSON.

    Args:
        model: Release or checkpoint that samples.
        manifests: Records of these are asked, as many of each.
        split: Of the records.
        images: Groups of 8 completions, in all.
        out: Also written here.
    """
    module = Grpo(model, views=1).eval()
    module.log = module.log_dict = lambda *_, **__: None
    module.core_seg.reasoner.merge_lora()
    each = images // len(manifests)
    records = []
    for manifest in manifests:
        of_split = [record for record in read_manifest(manifest) if record.split == split]
        records += [of_split[place * len(of_split) // each] for place in range(min(each, len(of_split)))]
    data, groups = module.training_data(records), []
    for first in tqdm(range(0, len(records), 8), desc="sampling", unit="batch"):
        module.hparams.seed = first  # else every batch would be sampled with the same numbers
        with torch.no_grad():
            for group in module.sample(data[[(place, 0) for place in range(first, min(first + 8, len(records)))]]):
                group.score(module.look(group)[1], module.rewards)
                groups.append(group)
    dice = torch.stack([group.dice for group in groups])
    rewards = [rewards_of(group) for group in groups]
    table = {}
    for name in rewards[0]:
        values = torch.stack([of_group[name] for of_group in rewards])
        both = (teaches(values) & teaches(dice)).tolist()
        ranks = [spearmanr(value, score).statistic for value, score, ok in zip(values, dice, both) if ok]
        table[name] = {
            "frac_zero_std": round(1 - float(teaches(values).float().mean()), 4),
            "std_in_group": round(float(values.std(1).mean()), 4),
            "rank_correlation_with_dice": round(float(np.mean(ranks)), 3),
        }
        print(f"{name:32s} {table[name]}")
    result = {
        "model": Path(model).name,
        "groups": len(groups),
        "hit_rate": round(float((dice >= 0.05).float().mean()), 4),
    }
    line = json.dumps(result | {"rewards": table} | machine())
    if out:
        out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    run(main)
