"""One GRPO step of the lab against one of trl's `GRPOTrainer`: time, peak memory, and where ours spends its time.

    .venv/bin/pip install -r benchmarks/requirements.txt
    python -m benchmarks.grpo_step --out docs/results/grpo_step.json

The same FastVLM of `tiny` with the same LoRA, the same 8 images x 8 completions x 96 tokens and one optimiser step, one
after another in one process, in float32. Ours is measured as it trains (scene, masks, segment reward and DiceCE, which
trl's does not have) and with text rewards alone, as trl's; its samples are replaced by valid answers of the same
length, so that rewards, masks and losses have all of their work. trl's is measured with its defaults (gradient
checkpointing on, no KL) and without checkpointing. A first, untimed side takes the one-off costs. Ratios count, not
seconds.
"""

import gc
import json
import tempfile
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image

from benchmarks import run
from benchmarks.clock import Clock, PeakMemory
from lab.data.manifest import read_manifest
from lab.data.mixture import Part
from lab.data.synthetic import write_plain
from lab.evaluation.report import machine
from lab.grpo.rewards import format_rewards
from lab.model.answer import render
from lab.model.core_seg import CoreSeg, CoreSegConfig
from lab.model.reasoner import IMAGE, Reasoner
from lab.model.release import load_release, save_release
from modules import grpo
from modules.data import Lesions
from modules.groups import Group, Rewards
from modules.grpo import Grpo

IMAGES, GROUP, TOKENS, LORA, SIZE = 8, 8, 96, 16, 320
SEED = 0


class Stopwatch(L.Callback):
    """Seconds of each training batch; a `clock` of their parts leaves out the first."""

    def __init__(self, clock: Clock) -> None:
        self.seconds: list[float] = []
        self.clock = clock

    def on_train_batch_start(self, *_: object) -> None:
        if len(self.seconds) == 1:
            self.clock.seconds.clear()  # the first batch warmed up
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def ours(start: Path, manifest: Path, steps: int, masks: bool) -> dict:
    """Our step.

    Args:
        start: Release of the model.
        manifest: Of the images.
        steps: Timed after one that warms up.
        masks: Whether masks are drawn, rewarded and trained, or only text as in trl.
    """
    rewards = Rewards() if masks else Rewards(detect=0.0, segment=0.0, faithful=1.0)
    module = Grpo(str(start), LORA, rewards=rewards, views=1, group_size=GROUP, max_new_tokens=TOKENS, beta=0.0)
    never_ends(module.core_seg.reasoner)
    if not masks:
        module.look = lambda group: (module.read(group, group.prompt), {})
    clock = Clock()
    watch = Stopwatch(clock)
    clock.wrap(module, "encode", "encoders")
    clock.wrap(module.core_seg, "masks", "forward: mask decoder")
    clock.wrap(module, "manual_backward", "backward")
    clock.wrap(module, "update", "optimiser")
    real = grpo.collect, grpo.group_pass, Group.score
    grpo.collect = lambda *sampled: written(module.core_seg.reasoner, real[0](*sampled))
    clock.wrap(grpo, "collect", "rollout")
    clock.wrap(grpo, "group_pass", "forward: language model")
    clock.wrap(Group, "score", "rewards")
    part = Part(str(manifest), IMAGES)
    data = Lesions([part], str(manifest), steps_per_epoch=steps + 1, num_workers=0, seed=SEED)
    trainer = L.Trainer(
        max_steps=steps + 1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[watch],
    )
    with PeakMemory() as memory:
        trainer.fit(module, datamodule=data)
    grpo.collect, grpo.group_pass, Group.score = real
    taught = sum(group.teaches for group in module.groups)
    drawn = sum(int(group.masks.flatten(1).any(1).sum()) for group in module.groups)
    assert taught == IMAGES, f"only {taught} of {IMAGES} groups taught something"
    total = sum(watch.seconds[1:])
    clock.seconds["the rest"] = total - sum(clock.seconds.values())
    share = {part: round(seconds / total, 3) for part, seconds in clock.seconds.items()}
    return result(watch.seconds[1:], memory) | {"share_of_time": share, "masks_drawn": drawn}


def written(reasoner: Reasoner, groups: list[list[list[int]]]) -> list[list[list[int]]]:
    """Valid answers of exactly 96 tokens with other boxes and claims, in place of what an untrained model sampled.

    Else no reward, mask or loss would have anything to do.
    """
    assert {len(completion) for group in groups for completion in group} == {TOKENS}
    rng = np.random.default_rng(SEED)
    (filler,) = reasoner.tokenizer.encode(" left", add_special_tokens=False)

    def answer() -> list[int]:
        low = rng.uniform(0, 0.5, 2)
        boxes = np.hstack([low, low + rng.uniform(0.1, 0.5, 2)])[None]
        words = ("tiny small medium large", "darker brighter", "sharp blurred", "round oval irregular")
        size, tone, margin, shape = (rng.choice(choices.split()) for choices in words)
        claim = f"A {size} area is {tone}. Its margin is {margin}, its outline {shape}."
        ids = reasoner.completion_ids(render(f"Normal. {claim} This fits cyst.", "cyst", boxes, 100))
        return [ids[0], *[filler] * (TOKENS - len(ids)), *ids[1:]]

    return [[answer() for _ in group] for group in groups]


def theirs(start: Path, manifest: Path, steps: int, checkpointing: bool) -> dict:
    """trl's step: `GRPOTrainer` on images and prompts, rewarded for format."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlavaProcessor, SiglipImageProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    reasoner = load_release(start).reasoner
    never_ends(reasoner)
    tokenizer = reasoner.tokenizer
    tokenizer.image_token = IMAGE
    processor = LlavaProcessor(
        SiglipImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
    )
    records = read_manifest(manifest)[:IMAGES]
    rows = [
        {
            "prompt": [{"role": "user", "content": record.query}],
            "image": Image.fromarray(np.asarray(Image.open(record.image).convert("RGB"))),
        }
        for record in records
    ]

    def format_reward(completions: list, **_: object) -> list[float]:
        return format_rewards([completion[0]["content"] for completion in completions]).tolist()

    class Watch(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    watch = Watch()
    watch.seconds = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=reasoner.model,
            reward_funcs=format_reward,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=IMAGES * GROUP,
                num_generations=GROUP,
                max_completion_length=TOKENS,
                max_steps=steps + 1,
                learning_rate=1e-4,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=checkpointing,
                shuffle_dataset=False,
                seed=SEED,
            ),
            train_dataset=Dataset.from_list(rows * (steps + 1)),
            processing_class=processor,
            peft_config=LoraConfig(
                r=LORA, lora_alpha=2 * LORA, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
            ),
            callbacks=[watch],
        )
        with PeakMemory() as memory:
            trainer.train()
    return result(watch.seconds[1:], memory)


def never_ends(reasoner: torch.nn.Module) -> None:
    """Every completion gets its 96 tokens, on both sides."""
    reasoner.model.lm_head.register_forward_hook(
        lambda module, given, logits: logits.index_fill(-1, torch.tensor(reasoner.eos_id), -30.0)
    )


def result(seconds: list[float], memory: PeakMemory) -> dict:
    return {"seconds": round(float(np.median(seconds)), 3), "peak_mb": round(memory.megabytes)}


def main(out: Path | None = None, steps: int = 3) -> None:
    """Measure and print; the last line is JSON.

    Args:
        out: Also written here.
        steps: Optimiser steps that are timed, after one that warms up.
    """
    torch.set_num_threads(2)
    L.seed_everything(SEED)
    with tempfile.TemporaryDirectory() as folder:
        start, manifest = Path(folder) / "start", write_plain(Path(folder) / "data", IMAGES * 2, seed=SEED, size=SIZE)
        save_release(CoreSeg(CoreSegConfig()), start, "benchmark", "nothing", half=False)
        sides = {
            "first, not counted": lambda: ours(start, manifest, 1, masks=True),
            "ours": lambda: ours(start, manifest, steps, masks=True),
            "ours_text_only": lambda: ours(start, manifest, steps, masks=False),
            "trl": lambda: theirs(start, manifest, steps, checkpointing=True),
            "trl_without_checkpointing": lambda: theirs(start, manifest, steps, checkpointing=False),
        }
        measured = {}
        for name, side in sides.items():
            gc.collect()
            measured[name] = side()
            print(
                f"{name}: {measured[name]['seconds']} s a step, peak memory {measured[name]['peak_mb']} MB", flush=True
            )
    for part, share in sorted(measured["ours"]["share_of_time"].items(), key=lambda item: -item[1]):
        print(f"  {share:6.1%}  {part}")
    ratios = {
        "speedup": ratio(measured, "trl", "ours", "seconds"),
        "memory_ratio": ratio(measured, "ours", "trl", "peak_mb"),
    }
    ratios["speedup_text_only"] = ratio(measured, "trl", "ours_text_only", "seconds")
    ratios["memory_ratio_text_only"] = ratio(measured, "ours_text_only", "trl", "peak_mb")
    fast = "trl_without_checkpointing"
    ratios["speedup_without_checkpointing"] = ratio(measured, fast, "ours", "seconds")
    ratios["speedup_text_only_without_checkpointing"] = ratio(measured, fast, "ours_text_only", "seconds")
    line = json.dumps(ratios | measured | machine())
    if out:
        out.write_text(line + "\n")
    print(line)


def ratio(measured: dict, above: str, below: str, what: str) -> float:
    return round(measured[above][what] / measured[below][what], 2)


if __name__ == "__main__":
    run(main)
