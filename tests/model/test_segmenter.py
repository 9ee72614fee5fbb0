"""Without these our mask decoder could differ from segment-anything's, and real SAM weights would mean nothing."""

import pytest
import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer

from lab.errors import LabError
from lab.model.segmenter import BatchedMaskDecoder, PyramidImageEncoder, Segmenter, SegmenterConfig

SMALL = SegmenterConfig(image_size=64, embed_dim=32, weights="random")


@pytest.mark.parametrize("multimask", [0, 3])
def test_the_batched_decoder_gives_what_segment_anything_gives_one_by_one(multimask):
    def transformer():
        return TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=4)

    torch.manual_seed(0)
    theirs = MaskDecoder(transformer_dim=32, transformer=transformer(), num_multimask_outputs=multimask)
    ours = BatchedMaskDecoder(transformer_dim=32, transformer=transformer(), num_multimask_outputs=multimask)
    ours.load_state_dict(theirs.state_dict())
    embeddings, positions = torch.randn(5, 32, 8, 8), torch.randn(1, 32, 8, 8)
    sparse, dense = torch.randn(5, 3, 32), torch.randn(1, 32, 1, 1)
    batched = ours(embeddings, positions, sparse, dense)
    for row in range(5):
        one, _ = theirs(embeddings[[row]], positions, sparse[[row]], dense.expand(1, 32, 8, 8), multimask_output=False)
        torch.testing.assert_close(batched[row], one[0, 0], atol=1e-5, rtol=1e-4)


def test_masks_have_a_quarter_of_the_stride():
    segmenter = Segmenter(SMALL)
    embeddings = segmenter.encode(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert embeddings.shape == (2, 32, 8, 8)
    prompt = segmenter.box_prompt(torch.tensor([[0.0, 0, 10, 10], [5, 5, 60, 60]]))
    assert prompt.shape == (2, 2, 32) and segmenter.decode(embeddings, prompt).shape == (2, 32, 32)


def test_the_imagenet_weights_land_in_the_right_layers():
    """If the order of the tensors were wrong, shapes would disagree somewhere or the features would be noise."""
    encoder = PyramidImageEncoder(16)
    encoder.load_imagenet()
    first = encoder.backbone.conv_stem.weight
    assert first.abs().max() > 0.1 and encoder.backbone.conv_head.weight.shape == (1280, 320, 1, 1)
    assert (encoder.backbone.bn1.running_var != 1).all()


def test_sam_weights_are_loaded_from_a_real_file(tmp_path):
    """`vit_b` takes a `.pth` with segment-anything's own names: the layout of SAM and MedSAM downloads."""
    from segment_anything import sam_model_registry

    reference = sam_model_registry["vit_b"]()
    torch.save(reference.state_dict(), tmp_path / "sam.pth")
    config = SegmenterConfig(architecture="vit_b", image_size=1024, embed_dim=256, weights=str(tmp_path / "sam.pth"))
    segmenter = Segmenter(config)
    segmenter.load_pretrained()
    torch.testing.assert_close(segmenter.mask_decoder.mask_tokens.weight, reference.mask_decoder.mask_tokens.weight)
    torch.testing.assert_close(segmenter.image_encoder.pos_embed, reference.image_encoder.pos_embed)


def test_a_sam_encoder_refuses_another_size_than_its_own():
    with pytest.raises(LabError, match="1024"):
        Segmenter(SegmenterConfig(architecture="vit_b", image_size=320))
