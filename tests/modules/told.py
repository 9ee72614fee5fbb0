"""Stages that train a model that has learnt nothing, and put words into its mouth that something can be learnt from."""

from unittest.mock import patch

from torch import Tensor

import modules.grpo
from lab.model.decoding import collect
from modules.groups import Group
from modules.grpo import Grpo
from modules.sft import Sft


class ToldSft(Sft):
    """What it samples ends in a `<seg>`, in three of four rows."""

    def training_step(self, batch: dict[str, list], batch_idx: int) -> Tensor:
        reasoner, generate = self.core_seg.reasoner, self.core_seg.reasoner.generate

        def told(*given) -> list[list[int]]:
            draws = zip(generate(*given), batch["draw"])
            return [ids if index % 4 == 0 else [*ids, reasoner.seg_id, reasoner.eos_id] for ids, (index, _) in draws]

        with patch.object(reasoner, "generate", told):
            return super().training_step(batch, batch_idx)


class ToldGrpo(Grpo):
    """Of every image's completions the first is the true answer, the second the same without reasoning; about every
    other image all are noise, so that a process may have no group that teaches."""

    def sample(self, batch: dict[str, list]) -> list[Group]:
        ids = self.core_seg.reasoner.completion_ids

        def told(*given) -> list[list[list[int]]]:
            groups = collect(*given)
            for group, answer, (index, _) in zip(groups, batch["answer"], batch["draw"]):
                group[:2] = [ids(answer), ids("<think> - </think>" + answer.partition("</think>")[2])]
                if index % 4 < 2:
                    group[:] = [ids("noise")] * len(group)
            return groups

        with patch.object(modules.grpo, "collect", told):
            return super().sample(batch)
