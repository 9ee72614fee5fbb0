"""Without these a Qwen2.5-VL that sees an image in its own shape would read another image, or learn the wrong place."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lab.data.dataset import soft_target
from lab.data.images import Frame
from lab.errors import LabError
from lab.grpo.policy import group_pass
from lab.model.adapter import AdapterConfig
from lab.model.core_seg import CoreSeg, CoreSegConfig, Encoded, Seen
from lab.model.decoding import Sampling, collect, token_log_probs
from lab.model.gaze import noticed
from lab.model.reasoner import ReasonerConfig
from lab.model.segmenter import SegmenterConfig
from modules.sft import Sft
from tests.tiny_checkpoints import IMAGE_SIZES, REASONERS, qwen, written

SIDE = 224
"""Of the square, in pixels, for the segmenter and the reasoner alike: nothing is resized; 8 x 8 visual tokens."""
SIZES = [(112, 224), (224, 140), (224, 224)]
SHAPES = [[4, 8], [8, 5], [8, 8]]
"""Height and width of images, in pixels, and the rows and columns of visual tokens that show them."""
QUERIES = ["Segment the cyst.", "Locate and segment the larger of the dark ones in this image.", "Segment the mass."]
ANSWER = "<think> dark </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.manual_seed(0)
    reasoner = ReasonerConfig(qwen(tmp_path_factory.mktemp("qwen")), image_size=SIDE, dynamic=True)
    segmenter = SegmenterConfig(image_size=SIDE, embed_dim=32, weights="random")
    return CoreSegConfig(segmenter, reasoner, AdapterConfig(slots=2, depth=1))


@pytest.fixture(scope="module")
def model(config):
    return CoreSeg(config).eval()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def scene(model, images):
    return model.open(images, QUERIES)


@torch.no_grad()
def test_features_and_greedy_text_equal_hugging_faces_own(model, images, scene):
    """HF chooses size, patches and positions by itself, one image at a time."""
    reasoner = model.reasoner
    assert scene.encoded.shapes.tolist() == SHAPES
    ours = reasoner.generate(scene.prompts, scene.seen.visual, 12, shapes=scene.encoded.shapes)
    for row, (image, prompt) in enumerate(zip(images, scene.prompts)):
        seen = reasoner.image_processor([torch.from_numpy(image).permute(2, 0, 1)], return_tensors="pt")
        features = reasoner.tower(seen.pixel_values, grid_thw=seen.image_grid_thw).pooler_output
        assert prompt.count(reasoner.image_id) == len(features) == np.prod(SHAPES[row])
        found = scene.encoded.features[row]
        torch.testing.assert_close(found[: len(features)], features, atol=1e-4, rtol=1e-4)
        assert not found[len(features) :].any()
        ids = torch.tensor([prompt])
        theirs = written(reasoner, prompt, 12, mm_token_type_ids=(ids == reasoner.image_id).int(), **seen)
        assert ours[row] == theirs[: len(ours[row])]
        streamed = list(model.stream(model.open([image], [QUERIES[row]]), 12))
        assert streamed[-1] == reasoner.decode_text(ours[row])
    assert len({tuple(row) for row in ours}) == 3
    assert [said.text for said in model.predict(images, QUERIES, 12)] == [reasoner.decode_text(ids) for ids in ours]


@torch.no_grad()
def test_images_of_different_shapes_do_not_change_one_another(model, images, scene):
    completions = [model.reasoner.completion_ids(ANSWER)] * 3
    together = model(scene.encoded, scene.prompts, completions)
    length = len(completions[0])
    for row, (image, query) in enumerate(zip(images, QUERIES)):
        single = model.open([image], [query])
        alone = model(single.encoded, single.prompts, completions[:1])
        tokens = alone.relevance_logits.shape[1]
        assert tokens == np.prod(SHAPES[row])
        for found, expected in (
            (together.logits[row * length :][:length], alone.logits),
            (together.mask_logits[[row]], alone.mask_logits),
            (together.relevance_logits[[row], :tokens], alone.relevance_logits),
        ):
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@torch.no_grad()
def test_sampled_log_probs_are_those_of_the_training_pass(model, scene):
    """Rollout and training would be of two policies."""
    reasoner, visual, shapes = model.reasoner, scene.seen.visual, scene.encoded.shapes
    steps = list(reasoner.decode(scene.prompts, visual, 3, 8, Sampling(1.0, seed=1), shapes))
    tokens = collect(steps, 3, 3)
    log_probs = collect([step._replace(tokens=step.log_probs) for step in steps], 3, 3)
    for row, prompt in enumerate(scene.prompts):
        opened = reasoner.prompt([prompt], visual[[row]], shapes[[row]])
        trained = group_pass(reasoner, opened, tokens[row], 1.0)
        one = Encoded(*(field[[row]] for field in scene.encoded))
        for slot, completion in enumerate(tokens[row]):
            found = torch.tensor(log_probs[row][slot])
            torch.testing.assert_close(trained.log_probs[slot, : len(completion)], found, atol=2e-4, rtol=0)
            plain = token_log_probs(model(one, [prompt], [completion]).logits, 1.0, reasoner.forbidden)
            plain = plain.gather(1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(plain, found, atol=2e-4, rtol=0)


@pytest.fixture
def sft(config, tmp_path):
    return Sft(config, cache=str(tmp_path / "cache"))


def test_the_visual_token_that_shows_a_lesion_learns_so(sft):
    """Wide, tall and square, of sizes that no token divides; where it is bright, its features differ most."""
    reasoner, rng, targets, frames, places = sft.core_seg.reasoner, np.random.default_rng(0), [], [], []
    for (height, width), (rows, columns) in zip([(40, 97), (97, 61), (64, 64)], [(3, 8), (8, 5), (8, 8)]):
        frame, row, column = Frame(height, width, SIDE), int(rng.integers(rows)), int(rng.integers(columns))
        assert reasoner.shape(frame) == (rows, columns)
        y, x = int((row + 0.5) * height / rows), int((column + 0.5) * width / columns)  # the middle of what it shows
        image, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool)
        mask[y - 2 : y + 3, x - 2 : x + 3] = True
        image[mask] = 255
        pixels = torch.from_numpy(np.stack([frame.image(image), frame.image(0 * image)]))
        with torch.no_grad():
            bright, dark = sft.core_seg.encode(pixels, [frame] * 2).features
        places.append(row * columns + column)
        assert (bright - dark).norm(dim=1).argmax() == places[-1]
        targets.append(soft_target(mask, frame, SIDE // 2))
        frames.append(frame)
    right, counts = torch.full((3, 64), 9.0), [reasoner.tokens_of(frame) for frame in frames]
    for logits, count, place in zip(right, counts, places):
        logits[:count] = -9.0
        logits[place] = 9.0

    def loss(logits):
        return sft.relevance_loss(logits, targets, frames).item()

    assert loss(right) < 1e-3  # padding, where it is wrong, counts nothing
    for row, count in enumerate(counts):
        wrong = right.clone()
        wrong[row, :count] *= -1
        assert loss(wrong) == pytest.approx(9 / 3, abs=1e-2)  # all images count the same


@torch.no_grad()
def test_cached_features_make_the_batch_that_computed_ones_do(sft, images):
    """And black pixels that are the image's own are not taken for padding."""
    frames = [Frame(*size, SIDE) for size in (*SIZES, (SIDE, SIDE))]
    squares = [torch.from_numpy(frame.image(image)) for frame, image in zip(frames, images)]
    squares.append(squares[0])  # a square image whose lower half is black
    sft.log = lambda *_, **__: None

    def batch(rows):
        stored = [sft.cache.load(squares[row], frames[row]) for row in rows]
        return {"pixels": [squares[row] for row in rows], "frame": [frames[row] for row in rows], "features": stored}

    first, computed = batch([0, 1, 2, 3]), sft.encode(batch([0, 1, 2, 3]))
    assert first["features"] == [None] * 4
    again = batch([0, 1, 2, 3])
    assert [len(row["features"]) for row in again["features"]] == [32, 40, 64, 64]
    for one, other in zip(sft.encode(again), computed):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    two = sft.encode(batch([1, 0]))
    assert two.features.shape[1] == 40 and two.shapes.tolist() == [[8, 5], [4, 8]]
    torch.testing.assert_close(two.features[1, :32], computed.features[0, :32], atol=0, rtol=0)


@torch.no_grad()
def test_two_looks_mark_each_image_in_its_own_shape(config, images):
    twice = CoreSeg(replace(config, reasoner=replace(config.reasoner, notice=True))).eval()
    torch.nn.init.ones_(twice.reasoner.mark)
    scene = twice.open(images, QUERIES)
    plain = twice.reasoner.see(scene.encoded.features, scene.encoded.embeddings)
    marks = (scene.seen.visual - plain)[..., 0]
    for row, (image, query, shape) in enumerate(zip(images, QUERIES, SHAPES)):
        count, alone = shape[0] * shape[1], twice.open([image], [query])
        assert (marks[row, :count] > 0).all()
        torch.testing.assert_close(scene.seen.visual[row, :count], alone.seen.visual[0], atol=1e-4, rtol=1e-4)
        logits = torch.full_like(scene.seen.relevance_logits, -9)
        logits[row, count - 1] = 9  # the last of its visual tokens is in the corner of the image
        found = noticed(twice, replace(scene, seen=Seen(plain, logits)))[row]
        assert found.shape == image.shape[:2] and found[-1, -1] > 0.9 and (found > 0.5).mean() < 2 / count


@pytest.mark.parametrize("name", [name for name in REASONERS if name != "qwen"])
def test_other_models_refuse_it_with_one_sentence(name, tmp_path):
    reasoner = ReasonerConfig(REASONERS[name](tmp_path), image_size=IMAGE_SIZES[name], dynamic=True)
    with pytest.raises(LabError, match="reasoner.dynamic is for Qwen2.5-VL, not for") as error:
        CoreSeg(CoreSegConfig(SegmenterConfig(image_size=64, embed_dim=32, weights="random"), reasoner))
    assert "\n" not in str(error.value)
