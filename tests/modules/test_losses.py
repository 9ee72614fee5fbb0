"""Without these a loss could pull the model to another box, or another place, than that of the true mask."""

import pytest
import torch

from lab.data.images import Frame
from lab.model.core_seg import CoreSeg, Output
from lab.model.release import load_model, save_release
from modules.optimisation import adamw_warmup_cosine
from modules.sft import Sft
from tests.tiny_model import tiny_config


@pytest.fixture(scope="module")
def sft():
    return Sft(tiny_config())


def output(prompt_tokens):
    rows = torch.arange(len(prompt_tokens))
    return Output(torch.zeros(1, 5), torch.zeros(len(rows), 32, 32), rows, prompt_tokens, torch.zeros(1, 4))


def test_the_prompt_of_the_true_box_costs_nothing_and_another_does(sft):
    target = torch.zeros(32, 32)
    target[4:8, 10:20] = 1  # rows 8 to 16, columns 20 to 40 of the 64 px square
    extra = torch.randn(1, 2, 32)

    def loss(box):
        return sft.prompt_loss(output(torch.cat([sft.core_seg.segmenter.box_prompt(box), extra], 1)), [target]).item()

    assert loss(torch.tensor([[20.0, 8.0, 40.0, 16.0]])) == pytest.approx(0, abs=1e-9)
    assert loss(torch.tensor([[20.0, 8.0, 44.0, 16.0]])) > 1e-3
    assert sft.prompt_loss(output(torch.zeros(1, 4, 32)), [torch.zeros(32, 32)]) == 0  # drawn where there is nothing


def test_relevance_is_learnt_where_the_mask_is(sft):
    target = torch.zeros(32, 32)
    target[0:3, 17:20] = 1  # upper right of the 2 x 2 visual tokens
    right = torch.tensor([[-9.0, 9.0, -9.0, -9.0]])
    assert sft.relevance_loss(right, [target], [Frame(64, 64, 64)]) < 1e-3
    assert sft.relevance_loss(right.flip(1), [target], [Frame(64, 64, 64)]) > 1


def test_the_cosine_begins_where_it_is_told():
    def rates(**given):
        told = adamw_warmup_cosine([([torch.nn.Parameter(torch.zeros(2))], 1.0)], 0.0, 2, 10, **given)
        scheduler = told["lr_scheduler"]["scheduler"]
        return [scheduler.lr_lambdas[0](step) for step in (0, 1, 2, 5, 6, 8, 10, 12)]

    assert rates(falls_from=6) == pytest.approx([0.5, 1, 1, 1, 1, 0.5, 0, 0])
    assert rates() == rates(falls_from=1)
    assert rates()[4] == pytest.approx(0.5)


def test_a_language_checkpoint_leaves_the_segmenter_of_the_start_alone(tmp_path):
    """Both see through one backbone, which would be half of one model and half of the other."""
    for seed, name in enumerate(("start", "language")):
        torch.manual_seed(seed)
        save_release(CoreSeg(tiny_config()), tmp_path / name, "t", "nothing", half=False)
    start, language = (load_model(tmp_path / name) for name in ("start", "language"))
    made = Sft(start=str(tmp_path / "start"), language_checkpoint=str(tmp_path / "language")).core_seg
    for name, value in start.segmenter.state_dict().items():
        assert torch.equal(made.segmenter.state_dict()[name], value), name
    for name, value in language.reasoner.language_model.state_dict().items():
        assert torch.equal(made.reasoner.language_model.state_dict()[name], value), name
