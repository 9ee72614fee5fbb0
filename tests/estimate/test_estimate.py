"""Without these a user would rent GPUs on which the run then dies, or four times as many as it needs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from apps.cli import main
from apps.estimate import read_arguments
from lab.data.reason import write_reason
from lab.estimate.job import Job
from lab.estimate.machines import Machine
from lab.estimate.plan import GIB, USABLE, advise, estimate, estimates
from lab.estimate.published import architecture
from lab.model.core_seg import CoreSeg, CoreSegConfig
from lab.model.reasoner import ReasonerConfig
from lab.model.release import save_release
from lab.model.segmenter import SegmenterConfig

ROOT = Path(__file__).parents[2]
ANSWER = "<think> A cyst. </think><answer>The cyst are located at {}. The mask is <seg>.</answer>"
ONE = Machine(1, 1, 24)
MODEL = "--model.init_args"
SIZES = ["segmenter.image_size=128", "segmenter.embed_dim=64", "segmenter.weights=random"]
SIZES += ["reasoner.image_size=128", "reasoner.scene_dim=64", "reasoner.hidden_size=256"]


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    return write_reason(tmp_path_factory.mktemp("lesions"), 8, seed=9, fractions=(0.75, 0.25, 0.0), size=64)


def flags(stage, lesions, *more):
    part = f'[{{"manifest": "{lesions}", "per_batch": 8, "queries_per_image": 2}}]'
    data = "--data.init_args"
    return [
        *("-c", str(ROOT / "configs" / "tiny" / f"{stage}.yaml"), f"{MODEL}.cache=null", f"{MODEL}.views=2"),
        *(f"{data}.train={part}", f"{data}.val={lesions}", f"{data}.num_workers=0", f"{data}.steps_per_epoch=3"),
        *("--trainer.max_steps=3", "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu", *more),
    ]


def measured(stage, lesions, folder, *more):
    """Train three steps, and return the estimate of the same flags and what the third step took."""
    callback = {"class_path": "tests.estimate.measure.PeakOfFit", "init_args": {"path": str(folder / "peak.json")}}
    typed = flags(stage, lesions, *more)
    assert main(["fit", *typed, "--name=measured", f"--trainer.callbacks=[{json.dumps(callback)}]"]) == 0
    job, _ = read_arguments(typed)
    return job, json.loads((folder / "peak.json").read_text())


def compare(job, found):
    """Parameters to the last one, tensors to a thousandth, the peak to 15 %."""
    visual = (job.core_seg.reasoner.image_size // 32) ** 2
    job = replace(job, answer_tokens=max(found["answers"]), query_tokens=max(found["prompts"]) - visual)
    assert (job.records, job.images) == (found["records"], found["images"])
    guess = estimate(job, ONE, "single")
    assert (guess.total, guess.trained) == (found["parameters"], found["trained"])
    memory = guess.memory
    assert memory.weights + memory.sam == pytest.approx(found["weights"], rel=1e-3)
    assert memory.optimiser == pytest.approx(found["optimiser"], rel=1e-2)
    took = found["weights"] + found["peak"]
    print(
        "RATIO", memory.peak / took, (memory.peak - memory.held) / (took - memory.held), memory.peak, took, memory.worst
    )
    assert memory.peak == pytest.approx(took, rel=0.15)
    assert memory.peak - memory.held == pytest.approx(took - memory.held, rel=0.15)  # weights hide nothing


@pytest.mark.parametrize("bf16", [True, False])
def test_memory_of_stage_1_is_what_a_step_takes(lesions, tmp_path, monkeypatch, bf16):
    monkeypatch.chdir(tmp_path)
    sizes = [f"{MODEL}.core_seg.{size}" for size in SIZES]
    more = [f"{MODEL}.segmenter_checkpoint=null", f"{MODEL}.bf16={bf16}", f"{MODEL}.decoder_after=0", *sizes]
    job, found = measured("sft", lesions, tmp_path, *more, f"{MODEL}.own_text=0")
    compare(job, found)


def test_memory_of_stage_2_is_what_a_step_takes(lesions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    segmenter = SegmenterConfig(image_size=128, embed_dim=64, weights="random")
    config = CoreSegConfig(segmenter, ReasonerConfig(image_size=128, scene_dim=64))
    model, length = CoreSeg(config), 96
    save_release(model, "start", "t", "nothing")

    def written(steps, images, group_size):
        """What would have been sampled by a model that has learnt to answer; what was sampled has taken its memory."""
        assert len(list(steps)) == length
        boxes = [f"[[{slot},{slot},60,{60 + slot}]]" for slot in range(group_size)]
        ids = [model.reasoner.completion_ids(ANSWER.format(box)) for box in boxes]
        return [[[row[0]] + row[1:2] * (length - len(row)) + row[1:] for row in ids] for _ in range(images)]

    monkeypatch.setattr("modules.grpo.collect", written)
    more = [f"{MODEL}.start=start", f"{MODEL}.max_new_tokens={length}", f"{MODEL}.bf16=true"]
    job, found = measured("grpo", lesions, tmp_path, *more)
    assert job.answer_tokens == length == max(found["answers"])
    compare(job, found)


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        # what the hub says of each model's safetensors
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3754.6),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8292.2),
        ("HuggingFaceTB/SmolVLM-256M-Instruct", 256.5),
        ("HuggingFaceTB/SmolVLM-500M-Instruct", 507.5),
    ],
)
def test_published_configurations_have_the_published_size(model, millions):
    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(architecture(model))
    assert sum(p.numel() for p in built.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def small_preset(**more):
    """SmolVLM-256M with LoRA behind SAM ViT-B: the real classes, in seconds."""
    reasoner = ReasonerConfig("HuggingFaceTB/SmolVLM-256M-Instruct", image_size=512, lora_rank=16)
    job = Job(
        *("sft", CoreSegConfig(SegmenterConfig("vit_b", 1024, 256), reasoner), (1, 1, 2, 2), 48, 64, 100, 16, True),
        *(torch.float32, False, True),
    )
    return replace(job, **more)


def test_flops_are_those_of_the_textbook():
    """2 forward a parameter and token (Kaplan et al. 2020); with LoRA frozen weights take no gradient: 2 backward.
    Attention of T tokens: 4 T^2 D forward, and 5 products of that size for 2 in a backward pass that recomputes."""
    found = estimate(small_preset(answer_tokens=256), ONE, "single")
    rows, length, width = found.job.records, found.prompt_tokens + 256, 576
    lora = 30 * 16 * (2 * (width + width) + 2 * (width + 192))
    layers = found.sizes["layers"] / 4 - lora
    linear = 4 * (layers * length + 256 * width * 49280)
    attention = 3.5 * 4 * length**2 * width * 30
    assert found.phases.learning.flops == pytest.approx(rows * (linear + attention), rel=0.15)  # beside: mask decoder


def test_gradient_checkpointing_and_halves_save_what_they_should():
    plain = estimate(small_preset(), ONE, "single").phases.learning
    again = estimate(small_preset(checkpointing=True), ONE, "single").phases.learning
    assert again.peak < 0.85 * plain.peak and again.flops > 1.2 * plain.flops  # logits stay
    found = estimate(small_preset(), ONE, "single"), estimate(small_preset(weights=torch.bfloat16), ONE, "single")
    vlm = 256.5e6
    assert found[0].memory.weights - found[1].memory.weights == pytest.approx(2 * vlm, rel=0.01)


def test_shards_add_up_and_a_share_is_a_part_of_the_batch():
    machine = Machine(1, 4, 80)
    one, ddp, fsdp2 = estimates(small_preset(), machine)
    assert one.job.records == 6 and ddp.job.records == fsdp2.job.records == 2
    assert ddp.memory.weights == one.memory.weights
    layers, layer = one.sizes["layers"], one.sizes["layer"]
    assert fsdp2.memory.weights == pytest.approx(one.memory.weights - layers * 3 / 4 + 2 * layer)
    assert fsdp2.memory.optimiser < ddp.memory.optimiser == 2 * ddp.memory.gradients


def test_advice_ends_where_it_fits():
    """Advice that does not help would be worse than none."""
    small = Machine(1, 1, 8)
    found = estimate(small_preset(), small, "single")
    assert not found.fits and found.memory.worst == "encoding images"  # SAM's attention over 4 images, in float32
    steps = list(advise(found, small_preset()))
    assert steps[-1][1].fits and not any(then.fits for _, then in steps[:-1])
    assert "per_batch halved" in " ".join(words for words, _ in steps)
    assert steps[-1][1].memory.peak <= USABLE * 8 * GIB < found.memory.peak


def test_the_command_says_what_fits_and_what_is_wrong(capsys, tmp_path):
    config = str(ROOT / "configs" / "tiny" / "sft.yaml")
    assert main(["estimate", "-c", config, "--gpus", "2x24GB", f"{MODEL}.max_new_tokens", "32"]) == 0
    said = capsys.readouterr().out
    assert "6.48 M are trained" in said and "fsdp2" in said and "NO" not in said and "answers of 32" in said
    for flags, problem in (
        (["-c", config, "--gpus", "8"], "is not like 8x80GB"),
        ([], "arguments are required: data, model"),
        (["-c", str(ROOT / "configs" / "tiny" / "segmenter.yaml")], "not SegmenterModule"),
        (["-c", config, f"{MODEL}.core_seg.reasoner.model=a/b"], "give the path of a local copy"),
        (["-c", config.replace("sft", "grpo"), f"{MODEL}.nothing=1"], "nothing"),
    ):
        assert main(["estimate", *flags]) == 2
        assert problem in capsys.readouterr().err
