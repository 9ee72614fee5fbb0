"""CORE-Seg: reasoner, prompt adapter and segmenter as one model with three entries: forward, generate, segment."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lab.data.dataset import model_pixels
from lab.data.images import Frame
from lab.data.reasoning import mirror
from lab.data.sample import without_specks
from lab.errors import LabError
from lab.model.adapter import AdapterConfig, adapter_for
from lab.model.answer import Answer, mirrored, parse
from lab.model.build import reasoner_for, segmenter_for
from lab.model.corroboration import corroborated
from lab.model.decoding import Sampling, collect, pad
from lab.model.reasoner import GREEDY, ReasonerConfig
from lab.model.segmenter import SegmenterConfig, normalise


@dataclass
class CoreSegConfig:
    """The three parts of the model."""

    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    reasoner: ReasonerConfig = field(default_factory=ReasonerConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    prompt: Literal["semantic", "boxes"] = "semantic"
    """What the mask decoder is given: the adapted `<seg>` state, or the boxes in the answer (a baseline)."""
    mirrored: bool = False
    """Segment the mirror image too, from the mirrored answer, and average (test-time flip); training does not."""
    threshold: float = 0.5
    """Probability above which a pixel is lesion; rewards in training take 0.5."""
    corroborate: bool = False
    """Read each answer again beside the mask that it drew, see `lab.model.corroboration`; training does not."""


class Encoded(NamedTuple):
    """What the two frozen encoders say of a batch of images; all that training needs of the pixels."""

    embeddings: Tensor
    """(B, C, h, w) image embeddings of the segmenter."""
    features: Tensor
    """(B, image_tokens, channels) features of the reasoner's vision tower, rows with fewer padded with zeros."""
    shapes: Tensor
    """(B, 2) rows and columns of visual tokens, see `Reasoner.shape`."""


class Seen(NamedTuple):
    """What the language model is shown of a batch of images that it is asked about."""

    visual: Tensor
    """(B, image_tokens, D) visual tokens."""
    relevance_logits: Tensor | None
    """(B, grid_tokens) of the first look, see `ReasonerConfig.notice`; None where there is one look alone."""
    gist: Tensor | None = None
    """(B, D), what the first look tells the adapter by itself, see `TextReasoner.gist_of`; None where nothing."""


@dataclass
class Scene:
    """Images that are asked about, encoded once for all that is done with them."""

    images: list[np.ndarray]
    """(H, W, 3) uint8 RGB each."""
    queries: list[str]
    encoded: Encoded
    prompts: list[list[int]]
    seen: Seen
    mirrored: "Scene | None" = None
    """The mirror images, once they have been asked for."""


class Output(NamedTuple):
    """A teacher-forced pass, or one over prompts alone (`CoreSeg.glance`)."""

    logits: Tensor
    """(L, vocabulary), one row for each label that is not -100, in row-major order; of a glance, relevance."""
    mask_logits: Tensor
    """(M, 4h, 4w) over the padded square, for the rows whose completion holds a `<seg>`, or those that were named."""
    mask_rows: Tensor
    """(M,) int, the batch row of each mask."""
    prompt_tokens: Tensor
    """(M, prompt_tokens, C), the adapter's prompts that drew the masks."""
    relevance_logits: Tensor
    """(B, grid_tokens), whether the visual token shows some of what the query asks for; rows with fewer are padded."""


@dataclass
class Prediction:
    """What the model says of one image."""

    text: str
    """The completion, special tokens included."""
    answer: Answer
    boxes: np.ndarray
    """(N, 4) float32, xyxy in pixels of the original image."""
    mask: np.ndarray
    """(H, W) bool; empty where the answer says that there is no lesion, or has no `<seg>`. An answer that is invalid
    may draw one, which counts for nothing: see `has_mask`."""
    probability: np.ndarray
    """(H, W) float32 in 0..1; zeros where no mask was drawn."""
    has_mask: bool
    """A mask was drawn or declared empty; False for an answer that is invalid or lacks its `<seg>`."""
    seconds: float
    tokens: int
    draft: str = ""
    """What the model wrote before `CoreSegConfig.corroborate` changed it; empty where it did not."""


class CoreSeg(nn.Module):
    """Reason, then segment: the `<seg>` state of the reasoner prompts the mask decoder through the adapter."""

    def __init__(self, config: CoreSegConfig, pretrained: bool = True) -> None:
        """
        Args:
            config: What to build.
            pretrained: Load the weights of the reasoner's checkpoint, where it is one; False is for those who load all
                weights after that. Those of the segmenter are random until `Segmenter.load_pretrained`.
        """
        super().__init__()
        if config.segmenter.image_size % 32:
            raise LabError(f"segmenter.image_size {config.segmenter.image_size} is not a multiple of 32; change it")
        self.config = config
        self.segmenter = segmenter_for(config.segmenter)
        self.reasoner = reasoner_for(config.reasoner, pretrained)
        self.adapter = adapter_for(config.adapter, self.reasoner.hidden_size, config.segmenter.embed_dim)
        self.queries = self.adapter.queries if config.adapter.kind == "queries" else None
        self.one_backbone = config.segmenter.architecture == "small" and self.reasoner.shares_tower
        if self.reasoner.shares_tower and not (self.reasoner.small or self.one_backbone):
            raise LabError(
                f"reasoner.model '{config.reasoner.model}' has no eyes and sees through the small segmenter's; set "
                "segmenter.architecture: small"
            )
        if self.one_backbone:
            if config.segmenter.image_size != config.reasoner.image_size:
                raise LabError(
                    f"segmenter.image_size {config.segmenter.image_size} is not reasoner.image_size "
                    f"{config.reasoner.image_size}, but both see through one backbone; make them equal"
                )
            self.reasoner.tower.timm_model = self.segmenter.image_encoder.backbone

    @property
    def device(self) -> torch.device:
        return self.reasoner.relevance.weight.device

    def freeze_encoders(self) -> None:
        """Freeze both image encoders and the prompt encoder (paper: SAM's image encoder is frozen)."""
        for encoder in self.encoders():
            encoder.requires_grad_(False).eval()
        self.segmenter.prompt_encoder.requires_grad_(False)

    def thaw_encoders(self) -> None:
        """Train both image encoders again, of the small one what comes after stride 8: the finest maps take more than
        half of the time, and what they show is the same in all pictures."""
        for encoder in self.encoders():
            encoder.requires_grad_(True)
        if self.config.segmenter.architecture == "small":
            self.segmenter.image_encoder.freeze_shallow()

    @property
    def preprocessing(self) -> str:
        """What the encoders' outputs depend on beside their weights and the padded square."""
        segmenter, reasoner = self.config.segmenter, self.config.reasoner
        dynamic = " dynamic" if reasoner.dynamic else ""
        return "" if self.one_backbone else f"{segmenter.pixel_range} {reasoner.image_size} {reasoner.dtype}{dynamic}"

    def encoders(self) -> tuple[nn.Module, nn.Module]:
        """The segmenter's image encoder and the reasoner's vision tower."""
        return self.segmenter.image_encoder, self.reasoner.tower

    def train(self, mode: bool = True) -> "CoreSeg":
        """As `nn.Module.train`, but encoders stay in eval mode: a batch that shows an image twice has no statistics."""
        super().train(mode)
        for encoder in self.encoders():
            encoder.eval()
        return self

    def encode(self, pixels: Tensor, frames: list[Frame]) -> Encoded:
        """Padded squares (B, S, S, 3) uint8 RGB of images in these frames through both encoders; where they share a
        backbone, it runs once."""
        shapes = self.shapes(frames)
        if self.one_backbone:
            embeddings, stride_32 = self.segmenter.image_encoder.with_stride_32(normalise(pixels))
            return Encoded(embeddings, stride_32.flatten(2).transpose(1, 2), shapes)
        return Encoded(self.segmenter.encode(pixels), self.reasoner.encode(pixels, frames), shapes)

    def shapes(self, frames: list[Frame]) -> Tensor:
        """(B, 2), as in `Encoded`."""
        return torch.tensor([self.reasoner.shape(frame) for frame in frames], device=self.device)

    @property
    def draws_at_a_glance(self) -> bool:
        """Whether the adapter is told what the first look found, see `TextReasoner.gist_of`."""
        told = self.config.adapter.kind != "queries" and self.config.prompt != "boxes"
        return self.reasoner.has_gist and self.config.reasoner.notice and told

    def see(self, encoded: Encoded, prompts: list[list[int]]) -> Seen:
        """Images as the language model sees them when it is asked these prompts."""
        visual = self.reasoner.see(encoded.features, encoded.embeddings)
        if not self.config.reasoner.notice:
            return Seen(visual, None)
        visual, found = self.reasoner.marked(prompts, visual, encoded.shapes)
        return Seen(visual, found, self.reasoner.gist_of(visual, found) if self.draws_at_a_glance else None)

    def glance(self, encoded: Encoded, prompts: list[list[int]], rows: list[int]) -> Output:
        """A pass over prompts alone: relevance, which stands for the logits too, and where the first look tells the
        adapter what it found, the masks of these rows."""
        visual, found, gist = self.see(encoded, prompts)
        if found is None:
            found = self.reasoner.found(prompts, visual, encoded.shapes)
        mask_rows = torch.tensor([] if gist is None else rows, dtype=torch.long, device=self.device)
        prompt_tokens = self.adapter(gist[mask_rows]) if len(mask_rows) else visual[:0]
        masks = self.masks(encoded.embeddings[mask_rows], prompt_tokens)
        return Output(found, masks, mask_rows, prompt_tokens, found)

    def forward(
        self,
        encoded: Encoded,
        prompts: list[list[int]],
        completions: list[list[int]],
        blind: list[bool] | None = None,
        seen: Seen | None = None,
    ) -> Output:
        """Teacher-forced pass over prompts and completions, padded on the right.

        Args:
            encoded: Of B images.
            prompts: B rows of `Reasoner.prompt_ids`.
            completions: B rows of `Reasoner.completion_ids`.
            blind: Rows whose `<seg>` token must not attend to the completion before it, only to image and query: true
                text gives the boxes away, and a mask learnt from it alone need not heed the query.
            seen: What `see` gave for the same images and prompts, where it is at hand.

        Returns:
            Logits of the completion tokens and the masks of the first `<seg>` of each row that has one.
        """
        pad_id, tail = self.reasoner.pad_id, 0 if self.queries is None else len(self.queries)
        rows = [p + c + [pad_id] * tail for p, c in zip(prompts, completions)]
        input_ids, mask = pad(rows, pad_id, device=self.device)
        is_completion, _ = pad(
            [[0] * len(p) + [1] * (len(c) + tail) for p, c in zip(prompts, completions)], 0, device=self.device
        )
        is_query = (input_ids == pad_id) & (mask == 1) & (tail > 0)
        is_seg = (input_ids == self.reasoner.seg_id) & (is_completion == 1)
        hidden_from = None
        if blind is not None:
            of_blind = is_seg & torch.tensor(blind, device=self.device)[:, None]
            hidden_from = of_blind[:, :, None] & (is_completion == 1)[:, None, :]
        (visual, found, gist), shapes = seen or self.see(encoded, prompts), encoded.shapes
        hidden = self.reasoner(input_ids, mask, visual, is_completion, hidden_from, self.queries, shapes)
        logits = self.reasoner.model.lm_head(hidden[:, :-1][(is_completion[:, 1:] == 1) & ~is_query[:, 1:]])
        rows = (is_seg.any(1) & (self.config.prompt != "boxes")).nonzero()[:, 0]
        states = hidden[rows, is_seg[rows].int().argmax(1)]  # (M, D)
        if self.config.adapter.state == "mean":
            said = is_completion[rows, :, None] == 1
            states = (hidden[rows] * said).sum(1) / said.sum(1)
        if self.queries is not None:
            states = hidden[is_query].unflatten(0, (len(prompts), tail))[rows]  # (M, queries, D)
        relevance = self.reasoner.relevance_logits(hidden, input_ids) if found is None else found
        prompt_tokens = self.adapter(self.reasoner.told(states, None if gist is None else gist[rows]))
        return Output(logits, self.masks(encoded.embeddings[rows], prompt_tokens), rows, prompt_tokens, relevance)

    def masks(self, embeddings: Tensor, prompt_tokens: Tensor) -> Tensor:
        """Embeddings (M, C, h, w) and prompts (M, N, C) to mask logits (M, 4h, 4w) over the padded square."""
        if len(prompt_tokens) == 0:
            side = 4 * self.config.segmenter.embedding_size
            return embeddings.new_zeros(0, side, side)
        return self.segmenter.decode(embeddings, prompt_tokens)

    @torch.no_grad()
    def predict(
        self,
        images: list[np.ndarray],
        queries: list[str],
        max_new_tokens: int = 200,
        sampling: Sampling = GREEDY,
    ) -> list[Prediction]:
        """Reason about images (H, W, 3) uint8 RGB and segment what the queries ask for."""
        start = time.perf_counter()
        scene = self.open(images, queries)
        visual, shapes = scene.seen.visual, scene.encoded.shapes
        completions = self.reasoner.generate(scene.prompts, visual, max_new_tokens, sampling, shapes)
        return self.conclude(scene, completions, start)

    @torch.no_grad()
    def conclude(self, scene: Scene, completions: list[list[int]], start: float | None = None) -> list[Prediction]:
        """Segment from what the model wrote, read again beside its mask where the configuration says so.

        Args:
            scene: What was asked about.
            completions: Tokens, one row a query.
            start: `time.perf_counter()` when the work began; None is now.
        """
        start = time.perf_counter() if start is None else start
        predictions = self._segment(scene, completions, start)
        if not self.config.corroborate:
            return predictions
        limit, grid = self.config.reasoner.max_boxes, self.config.reasoner.grid
        pairs = zip(predictions, scene.images)
        texts = [corroborated(drawn.text, image, drawn.mask, grid, limit) for drawn, image in pairs]
        final = self._segment(scene, [self.reasoner.completion_ids(text) for text in texts], start)
        for prediction, drawn in zip(final, predictions):
            prediction.draft = drawn.text if drawn.text != prediction.text else ""
        return final

    @torch.no_grad()
    def open(self, images: list[np.ndarray], queries: list[str]) -> Scene:
        """Encode images (H, W, 3) uint8 RGB and queries, one for each."""
        size = self.config.segmenter.image_size
        frames = [Frame(*image.shape[:2], size) for image in images]
        pixels = torch.stack([model_pixels(image, size) for image in images]).to(self.device)
        prompts = [self.reasoner.prompt_ids(query, frame) for query, frame in zip(queries, frames)]
        encoded = self.encode(pixels, frames)
        return Scene(images, queries, encoded, prompts, self.see(encoded, prompts))

    @torch.no_grad()
    def segment_text(self, scene: Scene, texts: list[str]) -> list[Prediction]:
        """Segment from given answers, to the word."""
        completions = [self.reasoner.completion_ids(text) for text in texts]
        return self._segment(scene, completions, time.perf_counter())

    def stream(self, scene: Scene, max_new_tokens: int = 200, sampling: Sampling = GREEDY) -> Iterator[str]:
        """Yield the answer about one image so far, token by token; `segment_text` turns the last into a mask."""
        ids: list[int] = []
        visual, shapes = scene.seen.visual, scene.encoded.shapes
        for step in self.reasoner.decode(scene.prompts, visual, 1, max_new_tokens, sampling, shapes):
            ids.append(int(step.tokens))
            yield self.reasoner.decode_text(ids)

    def sample(self, scene: Scene, count: int, sampling: Sampling, max_new_tokens: int = 200) -> list[str]:
        """Several answers about one image; image and prompt are encoded once for all."""
        visual, shapes = scene.seen.visual, scene.encoded.shapes
        steps = self.reasoner.decode(scene.prompts, visual, count, max_new_tokens, sampling, shapes)
        return [self.reasoner.decode_text(ids) for ids in collect(steps, 1, count)[0]]

    def _segment(self, scene: Scene, completions: list[list[int]], start: float) -> list[Prediction]:
        texts = [self.reasoner.decode_text(ids) for ids in completions]
        drawn = self._draw(scene, completions)
        if self.config.mirrored and drawn:
            if scene.mirrored is None:
                images = [np.ascontiguousarray(image[:, ::-1]) for image in scene.images]
                scene.mirrored = self.open(images, [mirror(query) for query in scene.queries])
            grid = self.config.reasoner.grid
            other = self._draw(scene.mirrored, [self.reasoner.completion_ids(mirrored(text, grid)) for text in texts])
            drawn = {row: (probability + other[row][:, ::-1]) / 2 for row, probability in drawn.items()}
        seconds = (time.perf_counter() - start) / len(texts)
        predictions = []
        for row, (image, text) in enumerate(zip(scene.images, texts)):
            height, width = image.shape[:2]
            answer = parse(text, self.config.reasoner.grid)
            draws = row in drawn and not answer.says_empty
            probability = drawn[row] if draws else np.zeros((height, width), np.float32)
            predictions.append(
                Prediction(
                    text=text,
                    answer=answer,
                    boxes=answer.boxes_norm * np.array([width, height] * 2, np.float32),
                    mask=without_specks(probability > self.config.threshold),
                    probability=probability,
                    has_mask=answer.valid and (draws or answer.says_empty),
                    seconds=seconds,
                    tokens=len(completions[row]),
                )
            )
        return predictions

    def _draw(self, scene: Scene, completions: list[list[int]]) -> dict[int, np.ndarray]:
        """Row to probability (H, W) over its image, of the rows whose completion holds a `<seg>`."""
        frames = [Frame(*image.shape[:2], self.config.segmenter.image_size) for image in scene.images]
        if self.config.prompt == "boxes":
            masks = self._masks_of_boxes(scene, frames, completions)
        else:
            output = self(scene.encoded, scene.prompts, completions, seen=scene.seen)
            masks = dict(zip(output.mask_rows.tolist(), output.mask_logits))
        drawn = {}
        for row, logits in masks.items():
            drawn[row] = frames[row].logits_to_original(logits[None])[0].sigmoid().float().cpu().numpy()
        return drawn

    def _masks_of_boxes(self, scene: Scene, frames: list[Frame], completions: list[list[int]]) -> dict[int, Tensor]:
        """Row to mask logits (4h, 4w), of the rows whose completion names boxes."""
        masks = {}
        for row, (frame, ids) in enumerate(zip(frames, completions)):
            boxes = parse(self.reasoner.decode_text(ids), self.config.reasoner.grid).boxes_norm
            if len(boxes):
                masks[row] = self.mask_of_boxes(scene.encoded.embeddings[[row]], frame, boxes)
        return masks

    def mask_of_boxes(self, embedding: Tensor, frame: Frame, boxes_norm: np.ndarray) -> Tensor:
        """Mask logits (4h, 4w) of what lies in boxes (N, 4), N > 0, shares of width and height of an image."""
        in_pixels = boxes_norm * np.array([frame.width, frame.height] * 2, np.float32)
        return self.segmenter.union_of_boxes(embedding, frame, in_pixels)[0]
