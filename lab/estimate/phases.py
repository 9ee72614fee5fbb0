"""The parts of a training step, traced: encoding the images, sampling, learning.

They are written after `modules.sft`, `modules.grpo`, `lab.grpo.policy` and `lab.model.decoding`, with every length at
its longest, and call their models, losses and caches, not their steps, which look at values that do not exist here.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from lab.estimate.job import Job
from lab.estimate.skeleton import Skeleton
from lab.estimate.trace import Cost, fake, traced
from lab.grpo.objective import policy_loss
from lab.grpo.policy import LOGITS_AT_ONCE, token_stats
from lab.model.decoding import RoomyLayer, Sampling, choose
from lab.model.lora import lora_layers


@dataclass
class Phases:
    """What the parts of a step cost on one process; sampling costs nothing in a stage that does not sample."""

    encoding: Cost
    segmenter: Cost
    """SAM's image encoder alone, of `encoding`."""
    learning: Cost
    """All passes with gradients, and the reference's, of one batch."""
    sampling: Cost = field(default_factory=Cost)
    """Of a batch; `flops` are those of all tokens."""
    kv_cache: int = 0
    """Bytes of the keys and values at the last token, of `sampling`."""
    read_bytes: int = 0
    """By the sampling: weights and, on average, keys and values, once a token."""


def trace_phases(skeleton: Skeleton, job: Job) -> Phases:
    """Trace a step of a job."""
    encoding, segmenter, kept = encode(skeleton, job)
    with fake(skeleton):
        sampling, kv_cache, read_bytes = sample(skeleton, job) if job.sampled else (Cost(), 0, 0)
        learning = learn_batch(skeleton, job) if job.stage == "sft" else Cost()
    if job.stage == "grpo":
        group = learn_group(replace(job, asked=(1,), inner_steps=1, accumulate=1))
        times = job.records * job.inner_steps * job.accumulate
        learning = Cost(group.peak, group.left, group.flops * times, group.operators * times)
    for cost in (sampling, learning):
        cost.peak += kept  # the encoders' outputs are in use until the step ends
    return Phases(encoding, segmenter, learning, sampling, kv_cache, read_bytes)


@torch.no_grad()
def encode(skeleton: Skeleton, job: Job) -> tuple[Cost, Cost, int]:
    """Cost of both encoders over the batch's images and of SAM's alone, and the bytes of what is kept of the batch."""
    size = job.core_seg.segmenter.image_size
    pixels = torch.empty(job.images, 3, size, size, device="meta")
    features = None
    with traced() as both:
        with traced() as segmenter:
            embeddings = skeleton.segmenter.image_encoder(pixels)
        if not skeleton.one_backbone:
            features = skeleton.see(job.images)
        both_kept = sum(t.nbytes for t in (embeddings, features) if t is not None)
    return both, segmenter, both_kept * job.records // job.images


def sample(skeleton: Skeleton, job: Job) -> tuple[Cost, int, int]:
    """Cost of all completions of a batch, bytes of the cache at the end, and bytes that are read to write them."""
    rows, group, prompt = job.records, job.group_size, skeleton.prompt_tokens
    language_model, head = skeleton.language_model, skeleton.vlm.lm_head
    written = group * (job.answer_tokens - 1)  # behind the prompt, when the last token is chosen
    dtype = skeleton.language_model.dtype
    skeleton.eval()  # else layers that checkpoint gradients use no cache
    with torch.no_grad(), autocast(job) if job.stage == "sft" else nullcontext():
        cache = Cache(layer_class_to_replicate=RoomyLayer)

        def token(length: int, past: int, tokens: int) -> Tensor:
            """Last states of so many tokens behind a cache of `past` tokens."""
            return language_model(
                inputs_embeds=torch.empty(rows, length, skeleton.hidden_size, dtype=dtype),
                attention_mask=torch.empty(rows, 1, length, past + length, dtype=torch.bool),
                position_ids=skeleton.positions(rows, length),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -tokens:]

        with traced() as cost:
            with traced() as start:
                skeleton.look(rows, skeleton.embeddings(rows))
                merged = [layer.get_base_layer().weight.clone() for layer in lora_layers(skeleton.language_model)]
                token(prompt, 0, 1)
            for layer in cache.layers:
                fill(layer, prompt + written, group)
            in_cache = sum(layer.room.nbytes for layer in cache.layers)
            with traced() as end:
                logits = head(token(group, prompt + written, group))
                choose(
                    logits.float(), Sampling(temperature=1.0), [0], torch.empty(logits.shape[:2], dtype=torch.double)
                )
        layer = cache.layers[0]
        per_token = 2 * len(cache.layers) * rows * layer.keys[:1, :, :1].nbytes
    cost.flops = start.flops + end.flops * job.answer_tokens
    cost.operators = start.operators + end.operators * job.answer_tokens
    weights = sum(p.nbytes for part in (language_model, head) for p in part.parameters())
    read = job.answer_tokens * (weights + per_token * (prompt + written // 2))
    del merged
    skeleton.train()
    return cost, in_cache, read


def fill(layer: RoomyLayer, length: int, at_once: int) -> None:
    """Write keys and values until there are so many, `at_once` a time, as far as memory is concerned."""
    while layer.length < length:
        room = layer.room.shape[-2] - layer.length
        more = min(length - layer.length, (room // at_once + 1) * at_once)  # until it has to grow
        shape = (*layer.keys.shape[:2], more, layer.keys.shape[-1])
        layer.update(layer.keys.new_empty(1).expand(shape), layer.keys.new_empty(1).expand(shape))


def learn_batch(skeleton: Skeleton, job: Job) -> Cost:
    """Stage 1: teacher forcing of a batch, and its gradients."""
    rows, prompt, answer = job.records, skeleton.prompt_tokens, job.answer_tokens

    def loss() -> Tensor:
        embeddings = skeleton.embeddings(rows)
        if job.trains_encoders:
            embeddings = skeleton.segmenter.image_encoder(skeleton.pixels(job.images))
            embeddings = embeddings.repeat_interleave(-(-rows // job.images), 0)[:rows]
        with autocast(job):
            visual, relevance, gist = skeleton.look(rows, embeddings)
            hidden = skeleton.read(skeleton.embed(rows, prompt + answer, visual), rows)
            logits = skeleton.vlm.lm_head(hidden[:, prompt - 1 : -1].flatten(0, 1))
            if relevance is None:
                relevance = skeleton.relevance(hidden[:, : skeleton.image_tokens].float())[..., 0]
            masks = skeleton.segmenter.decode(embeddings, skeleton.prompts(hidden[:, -2], gist))
        text = F.cross_entropy(logits.float(), torch.empty(rows * answer, dtype=torch.long))
        shown = F.binary_cross_entropy_with_logits(relevance.float(), torch.empty_like(relevance.float()))
        return text + shown + mask_loss(masks.float())

    with traced() as cost:
        loss().backward()
        second = loss()  # Lightning drops the gradients of the last step between forward and backward pass
        skeleton.zero_grad()
        second.backward()
    cost.left = sum(p.nbytes for p in skeleton.parameters() if p.grad is not None)
    cost.peak -= cost.left  # they are counted by themselves
    cost.flops, cost.operators = (number * job.accumulate // 2 for number in (cost.flops, cost.operators))
    return cost


@lru_cache
def learn_group(job: Job) -> Cost:
    """Stage 2: the passes over the completions of one image, which are the same however many a batch has."""
    skeleton = Skeleton(job)
    prompt, group, answer = skeleton.prompt_tokens, job.group_size, job.answer_tokens
    length = prompt + group * answer
    policy = SimpleNamespace(model=skeleton.vlm, forbidden=[0])

    def read() -> tuple[Tensor, Tensor]:
        """Log-probabilities (G, T) of the completions, and their last states (G, D)."""
        embeds = skeleton.embed(1, length, skeleton.visual(1, skeleton.embeddings(1))).detach()
        of_tokens = skeleton.read(embeds, 1)[0, prompt:]
        tokens = torch.empty(group * answer, dtype=torch.long)
        parts = [
            checkpoint(token_stats, policy, states, following, 1.0, use_reentrant=False)[0]
            for states, following in zip(of_tokens.roll(1, 0).split(LOGITS_AT_ONCE), tokens.split(LOGITS_AT_ONCE))
        ]
        return torch.cat(parts).unflatten(0, (group, answer)), of_tokens.unflatten(0, (group, answer))[:, -2]

    def learn() -> None:
        reference = None
        if job.beta:
            with torch.no_grad(), autocast(job):
                reference = read()[0]
        with autocast(job):
            log_probs, states = read()
            embeddings = skeleton.embeddings(1).expand(group, -1, -1, -1)
            masks = skeleton.segmenter.decode(embeddings, skeleton.prompts(states))
        old, mask = log_probs.detach(), torch.empty(group, answer)
        loss, _ = policy_loss(log_probs, old, torch.empty(group), mask, reference, job.beta)
        loss = loss + mask_loss(masks.float())
        loss.backward()

    with fake(skeleton):
        for _ in range(2):  # the second finds the gradients of the first
            with traced() as cost:
                learn()
    return cost


def autocast(job: Job) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=job.bf16)


def mask_loss(logits: Tensor) -> Tensor:
    """DiceCE of mask logits (M, h, w); MONAI's looks at values."""
    target, probability = torch.empty_like(logits), logits.sigmoid()
    dice = 1 - 2 * (probability * target).sum((1, 2)) / (probability.sum((1, 2)) + target.sum((1, 2)))
    return dice.mean() + F.binary_cross_entropy_with_logits(logits, target)
