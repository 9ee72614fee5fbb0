"""Stage 2: RL-based reasoning exploration. GRPO on sampled completions, with DiceCE on their masks (CORE-Seg, 3.4)."""

from dataclasses import asdict
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from torch import Tensor

from lab.errors import LabError
from lab.grpo.objective import LossType, Scale, group_advantages, policy_loss, teaches
from lab.grpo.policy import GroupPass, group_pass
from lab.grpo.rewards import MISS
from lab.model.answer import parse
from lab.model.core_seg import Seen
from lab.model.decoding import Prompt, Sampling, collect
from lab.model.release import load_model
from modules.groups import Group, Rewards
from modules.parallel import clip_gradients, gather, gathered, is_sharded, rank, shares, sum_gradients, totals
from modules.precision import bfloat16
from modules.reasoning import ReasoningModule
from modules.scored import plain_arguments


class Grpo(ReasoningModule):
    """Sample a group of completions an image, score each, and make the better ones likelier.

    Args:
        start: Release folder, or checkpoint of stage 1, that the policy starts from and is held near to.
        lora_rank: Rank of the LoRA that is trained on the language model; switched off, it is the
            reference. Beside bfloat16 weights it is that of the start, of the same rank, whose copy is the reference.
        cache: Folder for the frozen encoders' outputs; None runs the encoders every time.
        views: Fixed ways in which every image is seen; 1 as it is, 2 also mirrored, more also augmented.
        rewards: Weights and kinds; see `Rewards`.
        group_size: Completions an image (G).
        temperature: Of the sampling.
        top_p: Likeliest tokens that together reach this probability are sampled from; 1 is all.
        top_k: This many of the likeliest tokens are sampled from; 0 is all.
        max_new_tokens: Where a completion is cut.
        scale: Standard deviation that advantages are divided by: of the `group`, the `batch`, or `none`.
        loss_type: `grpo`, `dr_grpo` or `dapo`; see `lab.grpo.objective.policy_loss`.
        beta: Weight of the KL penalty (k3) to the model of the start.
        clip_low: How far the ratio may fall below 1.
        clip_high: How far it may rise above 1.
        inner_steps: Optimiser steps on each batch of completions.
        seg_weight: Of DiceCE on the masks of the completions.
        bf16: Run the training passes, not the sampling, with bfloat16 autocast where the hardware has it; weights and
            losses stay float32.
        gradient_checkpointing: Compute the language model's activations twice instead of keeping them.
        learning_rate: Peak rate of AdamW for the policy's LoRA.
        seg_learning_rate: The same for adapter and mask decoder.
        weight_decay: AdamW's decay.
        warmup_steps: Optimiser steps of linear warm-up.
        total_steps: Where the cosine reaches zero; keep it equal to the trainer's `max_steps`.
        clip_norm: Gradients are scaled down to this norm.
        seed: Of the sampling, with the step.
    """

    stage = "grpo"

    def __init__(
        self,
        start: str,
        lora_rank: int = 16,
        cache: str | None = None,
        views: int = 2,
        rewards: Rewards | None = None,
        group_size: int = 8,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 200,
        scale: Scale = "group",
        loss_type: LossType = "grpo",
        beta: float = 0.04,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        inner_steps: int = 1,
        seg_weight: float = 1.0,
        bf16: bool = False,
        gradient_checkpointing: bool = False,
        learning_rate: float = 1e-3,
        seg_learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 10,
        total_steps: int = 300,
        clip_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rewards = rewards or Rewards()
        arguments = plain_arguments(locals(), "rewards")
        if group_size < 2 or temperature <= 0 or not 0 < top_p <= 1:
            raise LabError(
                f"group_size {group_size}, temperature {temperature}, top_p {top_p}: a group is 2 or more completions "
                "that can differ; set group_size >= 2, temperature > 0 and 0 < top_p <= 1"
            )
        model = load_model(Path(start))
        if model.config.prompt == "boxes" and seg_weight:
            raise LabError(
                f"'{start}' draws from the boxes in its answers, which no mask's gradient reaches; set seg_weight to 0"
            )
        elif model.config.prompt != "boxes" and model.config.adapter.state == "mean":
            raise LabError(
                f"'{start}' draws from the mean over its answers, where stage 2 draws from their <seg>; start from "
                "another model"
            )
        model.reasoner.train_lora(lora_rank)
        self.save_hyperparameters({"core_seg": asdict(model.config), "rewards": asdict(rewards), **arguments})
        self.hold(model, cache)
        self.rewards = rewards
        self.register_buffer("num_tokens", torch.zeros((), dtype=torch.long))
        self.dice_ce = DiceCELoss(sigmoid=True)
        self.automatic_optimization = False  # one batch of completions may serve several optimiser steps

    def training_step(self, batch: dict[str, list], batch_idx: int) -> None:
        h = self.hparams
        self.step, self.groups = self.global_step, self.sample(batch)
        counts = gather([len(self.groups)])
        idle = [self.groups[-1].idle() for _ in range(max(counts) - len(self.groups))] if is_sharded(self) else []
        if h.scale == "batch":  # no advantage is known before the last reward is
            with torch.no_grad():
                for group in [*self.groups, *idle]:
                    group.score(self.look(group)[1], self.rewards)
            advantages = group_advantages(torch.stack(gather([group.total for group in self.groups])), "batch")
            for group, row in zip(self.groups, advantages[sum(counts[: rank()]) :]):
                group.advantages = row
        for inner_step in range(h.inner_steps):
            learnt = [self.learn(group) for group in [*self.groups, *idle]]  # one graph in memory at a time, not B
            self.log_dict(totals({name: sum(part[name] for part in learnt) for name in learnt[0]}, self.device))
            if inner_step == 0:
                self.log_groups()
            self.update()

    def sample(self, batch: dict[str, list]) -> list[Group]:
        """Completions for every image of a batch; image and prompt are encoded once for all of a group."""
        reasoner, h = self.core_seg.reasoner, self.hparams
        encoded = self.encode(batch)
        prompts = [reasoner.prompt_ids(query, frame) for query, frame in zip(batch["query"], batch["frame"])]

        def open_prompts() -> tuple[Seen, list[Prompt]]:
            seen = self.core_seg.see(encoded, prompts)
            rows = range(len(prompts))
            return seen, [reasoner.prompt([prompts[i]], seen.visual[[i]], encoded.shapes[[i]]) for i in rows]

        with torch.no_grad():  # what is trained of a prompt's reading, LoRA, is so in each pass through it anew
            seen, opened = open_prompts()
            of_start = opened
            if h.beta and reasoner.config.notice:
                with reasoner.reference():
                    of_start = open_prompts()[1]
        seed = h.seed * 1_000_003 + self.global_step
        sampling = Sampling(h.temperature, h.top_p, h.top_k, seed, batch["draw"])
        with gathered(self):
            steps = reasoner.decode(prompts, seen.visual, h.group_size, h.max_new_tokens, sampling, encoded.shapes)
            sampled = collect(steps, len(prompts), h.group_size)
        groups = []
        for image, completions in enumerate(sampled):
            texts = [reasoner.decode_text(completion) for completion in completions]
            answers = [parse(text, self.core_seg.config.reasoner.grid) for text in texts]
            by_boxes = self.core_seg.config.prompt == "boxes"
            names = [len(a.boxes_norm) if by_boxes else reasoner.seg_id in c for a, c in zip(answers, completions)]
            groups.append(
                Group(
                    item={name: values[image] for name, values in batch.items()},
                    embedding=encoded.embeddings[[image]],
                    gist=None if seen.gist is None else seen.gist[[image]],
                    prompt=opened[image],
                    reference_prompt=of_start[image],
                    completions=completions,
                    texts=texts,
                    answers=answers,
                    draws=[answer.valid and bool(named) for answer, named in zip(answers, names)],
                )
            )
        counts = {"tokens": sum(group.tokens for group in groups), "images": len(groups)}
        counts["masks"] = sum(sum(group.draws) for group in groups)
        part = shares(counts, self.device)
        for group in groups:
            group.token_share = part["tokens"] * group.tokens / counts["tokens"]
            group.seg_share = part["masks"] * sum(group.draws) / max(1, counts["masks"])
            group.policy_share = group.token_share if h.loss_type == "dapo" else part["images"] / len(groups)
        return groups

    def autocast(self) -> torch.autocast:
        return bfloat16(self.device, self.hparams.bf16)

    def read(self, group: Group, prompt: Prompt) -> GroupPass:
        with self.autocast():
            said, temperature, queries = group.completions, self.hparams.temperature, self.core_seg.queries
            return group_pass(self.core_seg.reasoner, prompt, said, temperature, queries)

    def look(self, group: Group) -> tuple[GroupPass, dict[int, Tensor]]:
        """The one pass that gives log-probs, `<seg>` states and, by the number of the completion that drew them, mask
        logits (h, w) over the padded square; a model that draws from boxes does so here too."""
        read = self.read(group, group.prompt)
        if self.core_seg.config.prompt == "boxes":
            frame, boxes = group.item["frame"], {slot: a.boxes_norm for slot, a in enumerate(group.answers)}
            with torch.no_grad():
                draw = self.core_seg.mask_of_boxes
                return read, {slot: draw(group.embedding, frame, found) for slot, found in boxes.items() if len(found)}
        embeddings = group.embedding.expand(len(read.seg_rows), -1, -1, -1)
        with self.autocast():
            told = self.core_seg.reasoner.told(read.seg_states, group.gist)
            drawn = self.core_seg.masks(embeddings, self.core_seg.adapter(told))
        return read, dict(zip(read.seg_rows.tolist(), drawn))

    def learn(self, group: Group) -> dict[str, Tensor]:
        """Score a group, unless that is done, and add what it teaches to the gradients.

        On a sharded model every group has its backward pass, in which all processes meet; one that teaches nothing
        adds zeros.

        Returns:
            Its share of the losses and metrics of the batch.
        """
        h, sharded = self.hparams, is_sharded(self)
        if h.beta and group.reference is None:
            with torch.no_grad(), self.core_seg.reasoner.reference():
                group.reference = self.read(group, group.reference_prompt).log_probs
        with torch.set_grad_enabled(group.teaches or sharded):
            read, mask_logits = self.look(group)
            if group.old_log_probs is None:
                group.old_log_probs = read.log_probs.detach()
            if group.advantages is None:
                group.score(mask_logits, self.rewards)
                group.advantages = group_advantages(group.total[None], h.scale)[0]
            policy, metrics = policy_loss(
                read.log_probs,
                group.old_log_probs,
                group.advantages.to(self.device),
                read.mask,
                group.reference,
                h.beta,
                (h.clip_low, h.clip_high),
                h.loss_type,
                h.max_new_tokens,
            )
            policy, seg = group.policy_share * policy, group.seg_share * self.seg_loss(group, mask_logits)
        if group.teaches:
            self.manual_backward(policy + h.seg_weight * seg)
        elif sharded:
            self.manual_backward(0.0 * policy)
        metrics["entropy"] = (read.entropy * read.mask).sum() / read.mask.sum()
        losses = {"train/policy_loss": policy.detach(), "train/seg_loss": seg.detach()}
        return losses | {name: group.token_share * value for name, value in metrics.items()}

    def seg_loss(self, group: Group, mask_logits: dict[int, Tensor]) -> Tensor:
        """DiceCE on the masks of valid answers; zero where none was drawn."""
        drawn = [logits for slot, logits in mask_logits.items() if group.draws[slot]]
        if not drawn:
            return torch.zeros((), device=self.device)
        logits = torch.stack(drawn)[:, None].float()
        return self.dice_ce(logits, group.item["target"].to(self.device).expand_as(logits))

    def update(self) -> None:
        """One optimiser step on the gradients that there are."""
        optimizer = self.optimizers()
        if is_sharded(self) and not any(gather([group.teaches for group in self.groups])):
            optimizer.zero_grad()  # zeros would move the weights along earlier steps' momentum
        sum_gradients(self.parameters())
        clip_gradients(self.parameters(), self.hparams.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()

    def log_groups(self) -> None:
        """Metrics by trl's names and definitions, and the lab's own: `reward_group_std` is the mean deviation within
        groups, `rewards/<name>/frac_zero_std` the share of groups in which that reward alone tells nothing apart."""
        groups = gather([self.outcome(group) for group in self.groups])
        lengths = torch.cat([group["lengths"] for group in groups])
        unfinished = torch.cat([group["unfinished"] for group in groups])
        prompts = sum(self.hparams.group_size * group["prompt_tokens"] for group in groups)
        self.num_tokens += int(lengths.sum()) + prompts
        total, dice = (torch.stack([group[name] for group in groups]) for name in ("total", "dice"))
        values = {
            "reward": total.mean(),
            "reward_std": total.std(),
            "reward_group_std": total.std(1).mean(),
            "frac_reward_zero_std": 1 - teaches(total).float().mean(),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": unfinished.float().mean(),
            "num_tokens": self.num_tokens.float(),
            "dice": dice.mean(),
            "hit_rate": (dice >= MISS).float().mean(),
            "failure_rate": (dice == 0).float().mean(),
        }
        for name in groups[0]["rewards"]:
            rewards = torch.stack([group["rewards"][name] for group in groups])
            values |= {f"rewards/{name}/mean": rewards.mean(), f"rewards/{name}/std": rewards.std()}
            values[f"rewards/{name}/frac_zero_std"] = 1 - teaches(rewards).float().mean()
        values["claims/faithful"] = values["rewards/faithful/mean"]
        shown = ("reward", "dice", "failure_rate")
        self.log_dict({name: values.pop(name) for name in shown}, prog_bar=True)
        self.log_dict(values)

    def outcome(self, group: Group) -> dict:
        """What metrics of all processes' groups are made from."""
        lengths = torch.tensor([float(len(completion)) for completion in group.completions])
        unfinished = torch.tensor([completion[-1] != self.core_seg.reasoner.eos_id for completion in group.completions])
        kept = {"total": group.total, "dice": group.dice, "rewards": group.rewards}
        prompt_tokens = group.prompt.embeds.shape[1]
        return kept | {"lengths": lengths, "unfinished": unfinished, "prompt_tokens": prompt_tokens}
