"""Without these SAM 2's or MedSAM's weights would be fed, prompted or read otherwise than they were trained."""

import shutil
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from segment_anything import sam_model_registry
from transformers import Sam2Model

from lab.errors import LabError
from lab.model.build import segmenter_for
from lab.model.core_seg import CoreSeg, CoreSegConfig
from lab.model.reasoner import ReasonerConfig
from lab.model.release import ReleaseError, load_release, load_segmenter, save_release
from lab.model.segmenter import Segmenter, SegmenterConfig, min_max, normalise
from tests.model.test_pretrained import ADAPTER, IMAGE_SIZES, edited, same_answers
from tests.tiny_checkpoints import fastvlm, qwen, sam2

BOXES = torch.tensor([[0.0, 0, 30, 30], [5, 5, 60, 60], [20, 8, 40, 50]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return sam2(tmp_path_factory.mktemp("sam2"))


@pytest.fixture(scope="module")
def segmenter(checkpoint):
    ours = segmenter_for(SegmenterConfig("sam2", image_size=64, embed_dim=32, weights=checkpoint))
    ours.load_pretrained()
    return ours.eval()


@pytest.fixture
def pixels():
    return torch.randint(0, 255, (3, 64, 64, 3), dtype=torch.uint8)


@torch.no_grad()
def test_three_images_at_once_get_the_masks_that_hugging_face_draws_one_by_one(checkpoint, segmenter, pixels):
    """A box each; training and evaluation alike take the mask of SAM 2's first token."""
    theirs = Sam2Model.from_pretrained(checkpoint).eval()
    theirs.mask_decoder.dynamic_multimask_via_stability = False
    prompt = segmenter.box_prompt(BOXES)
    assert prompt.shape == (3, 3, 32)
    masks = segmenter.decode(segmenter.encode(pixels), prompt)
    assert masks.shape == (3, 16, 16)
    for row in range(3):
        one = theirs(normalise(pixels[[row]]), input_boxes=BOXES[None, [row]], multimask_output=False).pred_masks
        torch.testing.assert_close(masks[row], one[0, 0, 0], atol=1e-4, rtol=1e-4)
    segmenter.train()
    torch.testing.assert_close(segmenter.decode(segmenter.encode(pixels), prompt), masks)
    segmenter.eval()


def test_prompt_tokens_of_the_adapter_are_decoded_and_learn(segmenter, pixels):
    prompt = torch.randn(3, 5, 32, requires_grad=True)
    masks = segmenter.decode(segmenter.encode(pixels), prompt)
    masks.square().mean().backward()
    assert masks.shape == (3, 16, 16) and prompt.grad.abs().amax((1, 2)).min() > 0
    looked = segmenter.prompt_attention(segmenter.encode(pixels), prompt)
    assert looked.shape == (3, 4, 4)
    torch.testing.assert_close(looked.sum((1, 2)), torch.ones(3))
    assert segmenter.segment_boxes(np.zeros((50, 70, 3), np.uint8), np.array([[7.0, 5, 42, 30]])).shape == (50, 70)


def test_another_image_size_than_the_checkpoints_is_taken(checkpoint):
    """MedSAM 2 is SAM 2 at 512 px; positions and prompts must follow."""
    larger = segmenter_for(SegmenterConfig("sam2", image_size=96, embed_dim=32, weights=checkpoint))
    larger.load_pretrained()
    embeddings = larger.encode(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))
    assert larger.decode(embeddings, larger.box_prompt(BOXES[:1])).shape == (1, 24, 24)
    at_64 = segmenter_for(SegmenterConfig("sam2", image_size=64, embed_dim=32, weights=checkpoint))
    at_64.load_pretrained()
    torch.testing.assert_close(larger.box_prompt(1.5 * BOXES + 0.25), at_64.box_prompt(BOXES), atol=1e-4, rtol=1e-4)


def test_the_image_part_of_a_video_checkpoint_is_taken(checkpoint, segmenter, tmp_path):
    """Meta's own say `sam2_video` and bring a memory that is of no use here."""
    folder = shutil.copytree(checkpoint, tmp_path / "s")
    edited(folder, "config.json", lambda c: c.update(model_type="sam2_video", num_maskmem=7))
    ours = segmenter_for(SegmenterConfig("sam2", image_size=64, embed_dim=32, weights=str(folder)))
    ours.load_pretrained()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), segmenter.state_dict().values()))
    (folder / "model.safetensors").unlink()
    with pytest.raises(LabError, match="has no model.safetensors"):
        ours.load_pretrained()


def test_sam2_needs_a_checkpoint_that_fits(checkpoint, tmp_path):
    with pytest.raises(LabError, match="weights is null"):
        segmenter_for(SegmenterConfig("sam2", image_size=64, embed_dim=32))
    with pytest.raises(LabError, match="embed_dim is 256, but .* has 32"):
        segmenter_for(SegmenterConfig("sam2", image_size=64, embed_dim=256, weights=checkpoint))
    with pytest.raises(LabError, match="only sam2 will do"):
        segmenter_for(SegmenterConfig("sam2", image_size=64, embed_dim=64, weights=qwen(tmp_path)))


def test_a_release_with_sam2_needs_neither_checkpoint(checkpoint, tmp_path):
    segmenter = SegmenterConfig(
        "sam2", image_size=64, embed_dim=32, weights=shutil.copytree(checkpoint, tmp_path / "s")
    )
    segmenter.weights = str(segmenter.weights)
    reasoner = ReasonerConfig(qwen(tmp_path / "q"), image_size=IMAGE_SIZES["qwen"], lora_rank=2)
    model = CoreSeg(CoreSegConfig(segmenter, reasoner, ADAPTER)).eval()
    model.segmenter.load_pretrained()
    save_release(model, tmp_path / "release", "t", "nothing", half=False)
    save_release(model.segmenter, tmp_path / "stage0", "t", "nothing", half=False)
    shutil.rmtree(tmp_path / "q")
    shutil.rmtree(tmp_path / "s")
    images = [np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)] * 2
    same_answers(model, load_release(tmp_path / "release"), images, 0)
    box = np.array([[7.0, 5, 42, 30]])
    masks = [s.segment_boxes(images[0], box) for s in (model.segmenter, load_segmenter(tmp_path / "stage0"))]
    np.testing.assert_array_equal(*masks)
    edited(tmp_path / "stage0", "config.json", lambda c: c["segmenter"].update(weights="facebook/sam2.1-hiera-tiny"))
    with pytest.raises(ReleaseError, match="not in the release"):
        load_release(tmp_path / "stage0")


@pytest.fixture
def tiny_vit_b(monkeypatch):
    """segment-anything's own ViT builder and decoder at 1024 px, with an encoder that takes a moment."""
    small = partial(
        import_module("segment_anything.build_sam")._build_sam,
        encoder_embed_dim=32,
        encoder_depth=2,
        encoder_num_heads=2,
        encoder_global_attn_indexes=[],
    )
    monkeypatch.setitem(sam_model_registry, "vit_b", lambda checkpoint=None: small(checkpoint=checkpoint))


def test_a_medsam_file_draws_its_masks_with_fastvlm_and_travels(tiny_vit_b, tmp_path):
    """As MedSAM_Inference.py computes it: values from 0 to 1, box, mask; then a release without the .pth."""
    theirs = sam_model_registry["vit_b"]().eval()
    torch.save(theirs.state_dict(), tmp_path / "medsam_vit_b.pth")
    medsam = SegmenterConfig("vit_b", 1024, 256, "min_max", str(tmp_path / "medsam_vit_b.pth"))
    reasoner = ReasonerConfig(fastvlm(tmp_path / "f"), image_size=IMAGE_SIZES["fastvlm"])
    model = CoreSeg(CoreSegConfig(medsam, reasoner, ADAPTER)).eval()
    model.segmenter.load_pretrained()
    image = np.random.default_rng(0).integers(20, 200, (1024, 1024, 3), dtype=np.uint8)
    box = torch.tensor([[100.0, 200, 500, 700]])
    with torch.no_grad():
        unit = (image - image.min()) / (image.max() - image.min())
        embedding = theirs.image_encoder(torch.tensor(unit).float().permute(2, 0, 1)[None])
        sparse, dense = theirs.prompt_encoder(points=None, boxes=box[:, None], masks=None)
        positions = theirs.prompt_encoder.get_dense_pe()
        expected, _ = theirs.mask_decoder(embedding, positions, sparse, dense, multimask_output=False)
        segmenter = model.segmenter
        masks = segmenter.decode(segmenter.encode(torch.from_numpy(image)[None]), segmenter.box_prompt(box))
    torch.testing.assert_close(masks[0], expected[0, 0], atol=1e-3, rtol=1e-3)
    save_release(model, tmp_path / "release", "t", "nothing", half=False)
    shutil.rmtree(tmp_path / "f")
    (tmp_path / "medsam_vit_b.pth").unlink()
    same_answers(model, load_release(tmp_path / "release"), [image[:, :700]] * 2, 0)


def test_values_run_from_0_to_1_image_by_image():
    pixels = torch.stack([torch.full((4, 4, 3), 90), torch.arange(48).reshape(4, 4, 3)]).to(torch.uint8)
    scaled = min_max(pixels)
    assert scaled[0].abs().max() == 0 and scaled[1].min() == 0 and scaled[1].max() == 1
    torch.testing.assert_close(scaled[1], pixels[1].permute(2, 0, 1) / 47)


@pytest.mark.parametrize("content", [b"no tensors", None])
def test_a_file_that_is_not_of_the_architecture_is_refused(tiny_vit_b, content, tmp_path):
    path = tmp_path / "sam.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, path) if content is None else path.write_bytes(content)
    segmenter = Segmenter(SegmenterConfig("vit_b", 1024, 256, weights=str(path)))
    with pytest.raises(LabError, match="is not a SAM or MedSAM .pth file of vit_b") as error:
        segmenter.load_pretrained()
    assert "\n" not in str(error.value)
