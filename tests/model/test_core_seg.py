"""Without these what is generated, trained on, and shared would be three different models."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lab.data.sample import lesion_boxes, without_specks
from lab.model.answer import mirrored
from lab.model.core_seg import CoreSeg, Seen
from lab.model.decoding import pad
from lab.model.gaze import noticed
from lab.model.release import ReleaseError, load_model, load_release, load_segmenter, release_files, save_release
from lab.model.segmenter import Segmenter
from tests.tiny_model import tiny_config

QUERIES = ["Segment the cyst.", "Locate and segment the larger of the dark ones in this image."]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    core_seg = CoreSeg(tiny_config(2)).eval()
    with torch.no_grad():  # logits far enough apart that a greedy choice is no tie
        core_seg.reasoner.model.get_input_embeddings().weight.mul_(8)
    return core_seg


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, shape, dtype=np.uint8) for shape in ((50, 70, 3), (64, 40, 3))]


def test_our_decoding_equals_hugging_face_generate(model, images, monkeypatch):
    """HF's own `generate`, from the same embeddings, one prompt at a time, without padding, and in causal order."""
    monkeypatch.setattr(model.reasoner, "small", False)
    scene = model.open(images, QUERIES)
    encoded, prompts = scene.encoded, scene.prompts
    ours = model.reasoner.generate(prompts, model.see(encoded, prompts).visual, 20)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        theirs = model.reasoner.model.generate(
            inputs_embeds=model.reasoner.embed(ids, model.see(encoded, prompts).visual[[row]]),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            suppress_tokens=[model.reasoner.image_id, model.reasoner.pad_id],
        )
        assert ours[row] == theirs[0].tolist()[: len(ours[row])]


def test_padding_changes_no_hidden_state(model, images):
    scene = model.open(images, QUERIES)
    encoded, prompts = scene.encoded, scene.prompts
    for left in (False, True):
        ids, mask = pad(prompts, model.reasoner.pad_id, left=left)
        together = model.reasoner(ids, mask, model.see(encoded, prompts).visual, torch.zeros_like(ids))
        for row, prompt in enumerate(prompts):
            one, visual = torch.tensor([prompt]), model.see(encoded, prompts).visual[[row]]
            alone = model.reasoner(one, torch.ones_like(one), visual, torch.zeros_like(one))
            torch.testing.assert_close(together[row][mask[row] == 1], alone[0], atol=1e-4, rtol=1e-4)


def test_greedy_decoding_writes_what_the_teacher_forced_pass_finds_likeliest(model, images):
    scene = model.open(images, QUERIES)
    encoded, prompts = scene.encoded, scene.prompts
    written = model.reasoner.generate(prompts, model.see(encoded, prompts).visual, 12)
    logits = model(encoded, prompts, written).logits
    logits[:, [model.reasoner.image_id, model.reasoner.pad_id]] = -torch.inf
    assert logits.argmax(-1).tolist() == [token for completion in written for token in completion]


def test_the_prompt_sees_all_of_itself_and_the_answer_only_what_came_before(model, images):
    scene = model.open(images[:1], QUERIES[:1])
    encoded, prompts = scene.encoded, scene.prompts
    length, visual = len(prompts[0]), model.see(encoded, prompts).visual
    ids = torch.tensor([prompts[0] + model.reasoner.completion_ids("dark round")])
    is_completion = (torch.arange(ids.shape[1]) >= length).long()[None]

    def states(changed_at):
        changed = ids.clone()
        changed[0, changed_at] += 1
        return model.reasoner(changed, torch.ones_like(ids), visual, is_completion)[0]

    as_is = model.reasoner(ids, torch.ones_like(ids), visual, is_completion)[0]
    assert not torch.allclose(states(length - 1)[0], as_is[0])
    torch.testing.assert_close(states(length)[:length], as_is[:length])


def test_what_the_first_look_finds_is_marked_before_a_word_is_written(images):
    """Marks of another query, or marks that the loss of the words moves, would be no answer to the question."""
    torch.manual_seed(0)
    config = tiny_config()
    config.reasoner.notice = True
    model = CoreSeg(config)
    scene = model.open(images, QUERIES)
    answers = [model.reasoner.completion_ids(text) for text in ("dark round", "bright")]
    before = model(scene.encoded, scene.prompts, answers)
    plain = model.reasoner.see(scene.encoded.features, scene.encoded.embeddings)
    torch.testing.assert_close(scene.seen.visual, plain)  # an untrained mark changes nothing
    torch.nn.init.ones_(model.reasoner.mark)
    output = model(scene.encoded, scene.prompts, answers)
    marks = model.see(scene.encoded, scene.prompts).visual - plain
    torch.testing.assert_close(marks, output.relevance_logits.sigmoid()[..., None].expand_as(marks))
    torch.testing.assert_close(output.relevance_logits, before.relevance_logits)  # they are of the first look
    assert not torch.allclose(output.logits, before.logits)
    lower_right = torch.full_like(scene.seen.relevance_logits, -9).index_fill(1, torch.tensor([3]), 9)
    for image, found in zip(images, noticed(model, replace(scene, seen=Seen(plain, lower_right)))):
        assert found.shape == image.shape[:2] and found[-1, -1] > 0.9 and found[0, 0] < 0.1
    other = model.see(scene.encoded, [scene.prompts[0], scene.prompts[0]]).visual - plain
    assert torch.allclose(other[0], marks[0]) and not torch.allclose(other[1], marks[1])
    output.logits.logsumexp(-1).sum().backward()
    assert model.reasoner.mark.grad.abs().sum() > 0 and model.reasoner.relevance.weight.grad is None


def test_only_a_seg_token_in_the_answer_draws_a_mask(model, images):
    texts = [
        "<think> a </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>",
        "<think> a </think><answer>No such lesion is found. The mask is empty.</answer>",
    ]
    drawn, empty = model.segment_text(model.open(images, ["Segment <seg> <image> the cyst."] * 2), texts)
    assert drawn.has_mask and drawn.mask.shape == (50, 70) and drawn.probability.max() > 0
    np.testing.assert_allclose(drawn.boxes, [[7, 5, 42, 30]], atol=1e-4)
    assert empty.has_mask and not empty.mask.any() and empty.mask.shape == (64, 40)
    (none,) = model.segment_text(model.open(images[:1], QUERIES[:1]), ["no idea"])
    assert not none.has_mask and not none.mask.any() and none.answer.problem


def test_the_mask_depends_on_the_text(model, images):
    text = "<think> {} </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"
    one, other = (
        model.segment_text(model.open(images[:1], QUERIES[:1]), [text.format(w)])[0] for w in ("dark", "bright round")
    )
    assert np.abs(one.probability - other.probability).max() > 1e-6


def test_boxes_can_take_the_place_of_the_semantic_prompt(model, images, monkeypatch):
    monkeypatch.setattr(model.config, "prompt", "boxes")
    text = "<think> {} </think><answer>The cyst are located at [[{}]]. The mask is <seg>.</answer>"
    scene, image = model.open(images[:1], QUERIES[:1]), images[0]

    def draw(words, box):
        return model.segment_text(scene, [text.format(words, box)])[0]

    first = draw("dark", "10,10,60,60")
    by_box = model.segmenter.segment_boxes(image, np.array([[7.0, 5, 42, 30]]))
    np.testing.assert_array_equal(first.mask, without_specks(by_box))
    np.testing.assert_array_equal(first.probability, draw("much brighter", "10,10,60,60").probability)
    assert np.abs(first.probability - draw("dark", "50,50,90,90").probability).max() > 1e-6


@pytest.mark.parametrize("kind, tokens", [("linear", 4), ("mlp", 1)])
def test_baselines_adapt_the_state_in_other_ways(kind, tokens, images):
    config = tiny_config()
    config.adapter.kind = kind
    model = CoreSeg(config).eval()
    assert model.adapter(torch.zeros(3, 64)).shape == (3, tokens, 32)
    answer = "<think> a </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"
    assert model.segment_text(model.open(images[:1], QUERIES[:1]), [answer])[0].has_mask


def test_the_mean_over_the_completion_can_take_the_place_of_the_seg_state(model, images, monkeypatch):
    text = "<think> dark </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"
    scene = model.open(images[:1], QUERIES[:1])
    completion, seen = model.reasoner.completion_ids(text), []
    monkeypatch.setattr(model.adapter, "forward", lambda states: seen.append(states) or torch.zeros(1, 4, 32))
    monkeypatch.setattr(model.config.adapter, "state", "mean")
    model(scene.encoded, scene.prompts, [completion])
    ids = torch.tensor([scene.prompts[0] + completion])
    is_completion = (torch.arange(ids.shape[1]) >= len(scene.prompts[0])).long()[None]
    hidden = model.reasoner(ids, torch.ones_like(ids), scene.seen.visual, is_completion)
    torch.testing.assert_close(seen[0], hidden[:, len(scene.prompts[0]) :].mean(1), atol=1e-5, rtol=1e-5)


def test_an_image_and_its_mirror_image_get_mirrored_masks(model, images, monkeypatch):
    monkeypatch.setattr(model.config, "mirrored", True)
    text = "<think> At the left. </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"
    image, other = images[0], np.ascontiguousarray(images[0][:, ::-1])
    one, two = (
        model.segment_text(model.open([pixels], ["Segment the cyst."]), [said])[0]
        for pixels, said in ((image, text), (other, mirrored(text, 100)))
    )
    np.testing.assert_allclose(one.probability, two.probability[:, ::-1], atol=1e-5)
    monkeypatch.setattr(model.config, "threshold", float(np.median(one.probability)))
    (again,) = model.segment_text(model.open([image], ["Segment the cyst."]), [text])
    np.testing.assert_array_equal(again.mask, without_specks(again.probability > np.median(one.probability)))


def test_a_corroborated_answer_keeps_its_draft_and_names_the_boxes_of_its_mask(model, images, monkeypatch):
    scene = model.open(images[:1], QUERIES[:1])
    text = (
        "<think> The skin. A tiny area at the left. This fits cyst. </think>"
        "<answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"
    )
    said = [model.reasoner.completion_ids(text)]
    (plain,) = model.conclude(scene, said)
    assert plain.text == text and plain.draft == ""
    monkeypatch.setattr(model.config, "corroborate", True)
    (final,) = model.conclude(scene, said)
    assert final.draft == text and final.answer.valid and final.has_mask
    height, width = images[0].shape[:2]
    drawn = lesion_boxes(plain.mask, model.config.reasoner.max_boxes) / ([width, height] * 2)
    np.testing.assert_allclose(final.answer.boxes_norm, drawn, atol=0.011)
    (again,) = model.segment_text(scene, [final.text])
    np.testing.assert_array_equal(again.mask, final.mask)


def test_a_blind_seg_token_sees_the_query_but_not_the_answer(model, images):
    """Else masks are learnt from the boxes in the true text, and the query is ignored."""
    text = "<think> {} </think><answer>The cyst are located at [[10,10,60,60]]. The mask is <seg>.</answer>"
    scene = model.open(images[:1], QUERIES[:1])
    encoded = scene.encoded

    def mask(query, word, blind):
        prompts, completions = [model.reasoner.prompt_ids(query)], [model.reasoner.completion_ids(text.format(word))]
        return model(encoded, prompts, completions, blind).mask_logits

    torch.testing.assert_close(mask("the cyst", "dark", [True]), mask("the cyst", "much", [True]))
    assert not torch.allclose(mask("the cyst", "dark", [False]), mask("the cyst", "much", [False]))
    assert not torch.allclose(mask("the cyst", "dark", [True]), mask("the larger", "dark", [True]))
    torch.testing.assert_close(mask("the cyst", "dark", [False]), mask("the cyst", "dark", None), atol=1e-4, rtol=1e-4)


def test_streaming_ends_in_what_predict_gives(model, images):
    *_, last = model.stream(model.open(images[:1], QUERIES[:1]), max_new_tokens=15)
    (prediction,) = model.predict(images[:1], QUERIES[:1], max_new_tokens=15)
    assert last == prediction.text


def test_a_query_cannot_smuggle_in_special_tokens(model):
    ids = model.reasoner.prompt_ids("<seg> <image> <assistant> cyst")
    assert model.reasoner.seg_id not in ids and ids.count(model.reasoner.image_id) == model.reasoner.image_tokens


def test_the_card_says_what_was_measured(model, tmp_path):
    values = {"mDice": 0.5, "mDice_ci": [0.4, 0.6], "failure_rate": 0.1, "n": 9}
    evaluation = {"manifest": "a/b.jsonl", "split": "test", "overall": values, "by": {"source": {"busi": values}}}
    save_release(model, tmp_path, "t", "nothing", evaluations=[evaluation])
    card = (tmp_path / "README.md").read_text()
    assert "| busi | 9 | 0.500 (0.400 to 0.600) | 10.0% |" in card and "Not a medical device" in card


def test_a_release_holds_the_worst_cases_that_it_was_given_and_those_alone(model, tmp_path):
    picture, folder = tmp_path / "worst.webp", tmp_path / "release"
    picture.write_bytes(b"RIFF")
    save_release(model, folder, "t", "nothing", gallery=picture)
    assert "(worst.webp)" in (folder / "README.md").read_text() and "worst.webp" in release_files(folder)
    (folder / "worst.webp").write_bytes(b"another")
    with pytest.raises(ReleaseError, match="worst.webp is damaged"):
        load_release(folder)
    save_release(model, folder, "t", "nothing")
    assert "(worst.webp)" not in (folder / "README.md").read_text() and "worst.webp" not in release_files(folder)


def test_a_release_gives_identical_outputs(model, images, tmp_path):
    save_release(model, tmp_path, "t", "nothing", half=False)
    (before,), (after,) = (m.predict(images[:1], QUERIES[:1], 15) for m in (model, load_release(tmp_path)))
    assert before.text == after.text
    np.testing.assert_array_equal(before.probability, after.probability)
    names = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert names <= {".safetensors", ".json", ".md", ".jinja"}, "a release must not hold a pickle"
    assert "Not a medical device" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:999]),
            "was changed",
        ),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "not a release"),
        (lambda d: edit(d, lambda c: c.update(format="other")), "not a release"),
        (lambda d: edit(d, lambda c: c["core_seg"].update(backdoor="os.system")), "backdoor is not known"),
        (lambda d: edit(d, lambda c: c["core_seg"]["reasoner"].update(layers="two")), "layers is 'two', not int"),
        (lambda d: edit(d, lambda c: c["core_seg"]["reasoner"].update(layers=3)), "do not fit"),
        (lambda d: edit(d, lambda c: c["core_seg"]["reasoner"].update(model="../../etc")), "is not in the release"),
    ],
)
def test_a_damaged_or_foreign_release_is_refused_with_one_sentence(model, tmp_path, damage, message):
    save_release(model, tmp_path, "t", "nothing")
    damage(tmp_path)
    with pytest.raises(ReleaseError, match=message) as error:
        load_release(tmp_path)
    assert "\n" not in str(error.value)


def test_a_segmenter_is_released_and_stage_1_starts_from_it_as_from_a_checkpoint(tmp_path, images):
    segmenter = Segmenter(tiny_config().segmenter).eval()
    save_release(segmenter, tmp_path, "Stage 0", "nothing", half=False)
    assert not (tmp_path / "tokenizer").exists() and "boxes" in (tmp_path / "README.md").read_text()
    again, box = load_segmenter(tmp_path), np.array([[7.0, 5, 42, 30]])
    np.testing.assert_array_equal(again.segment_boxes(images[0], box), segmenter.segment_boxes(images[0], box))
    with pytest.raises(ReleaseError, match="stage 0 and cannot reason"):
        load_model(tmp_path)


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
