"""CORE-Seg without numbers: the modules of a configuration on the meta device, for counting and for tracing."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText
from transformers.vision_utils import get_vision_position_ids

from lab.estimate.job import Job
from lab.estimate.published import architecture
from lab.model.adapter import adapter_for
from lab.model.build import segmenter_for
from lab.model.core_seg import Seen
from lab.model.look import Look
from lab.model.lora import add_lora
from lab.model.pretrained import LANGUAGE
from lab.model.reasoner import Reasoner
from lab.model.small import small_config, small_tokenizer
from lab.model.text import TextReasoner, with_eyes

TILED = ("idefics3", "smolvlm")


class Skeleton(nn.Module):
    """The parts of `lab.model.core_seg.CoreSeg` with their shapes and what of them is trained, but no values.

    It is built from configurations alone, because a hub's weights and tokenizer need not be there.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        config = job.core_seg.reasoner
        self.image_size, self.lora_targets = config.image_size, Reasoner.lora_targets
        small = config.model == "small"
        shapes = None if small else architecture(config.model)
        self.shares_tower = small or shapes.model_type == LANGUAGE
        self.query_tokens = job.query_tokens
        self.queries = job.core_seg.adapter.queries if job.core_seg.adapter.kind == "queries" else 0
        self.notice = config.notice
        self.one_backbone = self.shares_tower and job.core_seg.segmenter.architecture == "small"
        with torch.device("meta"):
            if small:
                shapes = small_config(config.hidden_size, config.layers, config.image_size, small_tokenizer())
            elif self.shares_tower:
                self.lora_targets = TextReasoner.lora_targets
                shapes.num_hidden_layers = config.first_layers or shapes.num_hidden_layers
                shapes = with_eyes(shapes, 0, config.image_size)
            self.vlm = AutoModelForImageTextToText.from_config(shapes)
            for part in (self.language_model, self.vlm.lm_head) if self.shares_tower else (self.vlm,):
                part.to(job.weights)
            self.segmenter = segmenter_for(job.core_seg.segmenter)
            self.adapter = adapter_for(job.core_seg.adapter, self.hidden_size, job.core_seg.segmenter.embed_dim)
            self.relevance = nn.Linear(self.hidden_size, 1)
            if not small and job.lora_rank:
                self.seg_rows = nn.Parameter(torch.empty(1 if shapes.tie_word_embeddings else 2, self.hidden_size))
            if self.shares_tower:
                self.scene = nn.Linear(2 * config.scene_dim, self.hidden_size)
                self.visual_norm = nn.LayerNorm(self.hidden_size)
                self.image_positions = nn.Parameter(torch.empty(self.image_tokens, self.hidden_size))
                if self.one_backbone:
                    self.tower.timm_model = self.segmenter.image_encoder.backbone
            if config.notice:
                self.mark = nn.Parameter(torch.empty(self.hidden_size))
            self.first_look = None
            if config.notice and self.shares_tower and not small:
                self.first_look = Look(self.hidden_size)
                self.gist = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
                self.heed = nn.Parameter(torch.empty(self.hidden_size))
        self.train_what(job)
        if job.checkpointing:
            self.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def train_what(self, job: Job) -> None:
        """Freeze and adapt as `Reasoner.add_lora`, `CoreSeg.freeze_encoders` and stage 2 do."""
        if job.stage == "grpo":
            looks = [self.first_look, self.gist] if self.first_look else []
            eyes = [self.scene, self.visual_norm] if self.shares_tower else []
            for part in (self.vlm, self.relevance, *eyes, *looks):
                part.requires_grad_(False)
            for name in ("image_positions", "mark", "heed"):
                if name in self._parameters:
                    self.get_parameter(name).requires_grad_(False)
        if job.lora_rank:
            for part in (self.language_model, self.vlm.lm_head) if self.shares_tower else (self.vlm,):
                part.requires_grad_(False)
            with torch.device("meta"):
                add_lora(self.language_model, job.lora_rank, self.lora_targets)
        if not job.trains_encoders:
            self.tower.requires_grad_(False)
            self.segmenter.image_encoder.requires_grad_(False)
        elif job.core_seg.segmenter.architecture == "small":
            self.segmenter.image_encoder.freeze_shallow()
        self.segmenter.prompt_encoder.requires_grad_(False)

    @property
    def tower(self) -> nn.Module:
        return self.vlm.get_encoder("image")

    @property
    def language_model(self) -> nn.Module:
        return self.vlm.get_decoder()

    @property
    def hidden_size(self) -> int:
        return self.language_model.config.hidden_size

    @property
    def tiles(self) -> int:
        """SmolVLM: pictures that an image is seen as, which are its tiles and, where there are several, the whole."""
        side = self.image_size // self.vlm.config.vision_config.image_size
        return side**2 + 1 if side > 1 else 1

    @property
    def image_tokens(self) -> int:
        """Visual tokens of an image; with `ReasonerConfig.dynamic` the most, of a square one."""
        config, vision = self.vlm.config, self.vlm.config.vision_config
        if config.model_type == "qwen2_5_vl":
            return (self.image_size // (vision.patch_size * vision.spatial_merge_size)) ** 2
        if config.model_type in TILED:
            return self.tiles * (vision.image_size // vision.patch_size // config.scale_factor) ** 2
        stride = 32 if self.shares_tower else self.tower.timm_model.feature_info[-1]["reduction"]
        return (self.image_size // stride) ** 2

    @property
    def prompt_tokens(self) -> int:
        return self.query_tokens + self.image_tokens

    def see(self, images: int) -> Tensor:
        """So many images through the vision tower and, where it is not trained, into the language model's space."""
        config, vision, side, dtype = self.vlm.config, self.vlm.config.vision_config, self.image_size, self.vlm.dtype
        if config.model_type in TILED:  # its forward looks at the values of a padding mask
            pixels = torch.empty(images * self.tiles, 3, *[vision.image_size] * 2, device="meta", dtype=dtype)
            embedded = self.tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2).contiguous()
            return self.vlm.model.connector(self.tower.encoder(inputs_embeds=embedded).last_hidden_state)
        pixels = torch.empty(images, 3, side, side, device="meta", dtype=dtype)
        if config.model_type == "qwen2_5_vl":
            patches = side // vision.patch_size
            grid = torch.tensor([[1, patches, patches]] * images)
            flat = pixels.new_empty(images * patches**2, 3 * vision.temporal_patch_size * vision.patch_size**2)
            places = get_vision_position_ids(grid, vision.spatial_merge_size).to("meta")
            return self.tower(flat, grid_thw=grid, position_ids=places).pooler_output
        return self.tower(pixels).last_hidden_state

    def pixels(self, images: int) -> Tensor:
        """Of the padded squares (B, 3, S, S), where the parameters are."""
        side = self.segmenter.config.image_size
        return self.relevance.weight.new_empty(images, 3, side, side)

    def embeddings(self, rows: int) -> Tensor:
        """The segmenter's of images (B, C, h, w), float32 as the cache gives them."""
        config = self.segmenter.config
        channels = config.embed_dim * (4 if config.architecture == "sam2" else 1)  # with its finer maps
        return torch.empty(rows, channels, config.embedding_size, config.embedding_size)

    def positions(self, rows: int, length: int) -> Tensor:
        """(B, T), or (3, B, T) where positions have three dimensions."""
        shape = (3, rows, length) if self.vlm.config.model_type == "qwen2_5_vl" else (rows, length)
        return torch.empty(shape, dtype=torch.long)

    def look(self, rows: int, embeddings: Tensor) -> Seen:
        """As `CoreSeg.see`."""
        visual = self.visual(rows, embeddings)
        if not self.notice:
            return Seen(visual, None)
        if self.first_look:
            with torch.no_grad():
                words = self.read(self.embed(rows, self.query_tokens, visual[:, :0]), rows)
            found = self.first_look(words.float(), torch.empty(words.shape[:2], dtype=torch.long), visual)
        else:
            hidden = self.read(self.embed(rows, self.prompt_tokens, visual), rows)
            found = self.relevance(hidden[:, : self.image_tokens].float())[..., 0]
        marked = visual + found.detach().sigmoid()[..., None] * self.mark
        return Seen(marked, found, TextReasoner.gist_of(self, marked, found) if self.first_look else None)

    def embed(self, rows: int, length: int, visual: Tensor) -> Tensor:
        """What the language model is given (B, T, D): visual tokens and words."""
        words = self.vlm.get_input_embeddings()(torch.empty(rows, length, dtype=torch.long))
        where = torch.empty(rows, length, 1, dtype=torch.bool)
        return words.masked_scatter(where, visual.to(words.dtype))

    def visual(self, rows: int, embeddings: Tensor) -> Tensor:
        """Visual tokens (B, image_tokens, D), by the layers that are trained."""
        if not self.shares_tower:
            return torch.empty(rows, self.image_tokens, self.hidden_size)
        features = torch.empty(rows, self.image_tokens, self.vlm.config.vision_config.hidden_size)
        visual = self.vlm.model.multi_modal_projector(features)
        side = math.isqrt(self.image_tokens)
        pooled = [pool(embeddings, side) for pool in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)]
        scene = self.scene(torch.cat(pooled, dim=1).flatten(2).transpose(1, 2))
        return self.visual_norm(visual + scene) + self.image_positions

    def prompts(self, states: Tensor, gist: Tensor | None = None) -> Tensor:
        """States (M, D), and what the first look found (M, D), to the mask decoder's prompts (M, prompt_tokens, C)."""
        states = states.float() if gist is None else TextReasoner.told(self, states, gist)
        return self.adapter(states[:, None].expand(-1, self.queries, -1) if self.queries else states)

    def read(self, embeds: Tensor, rows: int) -> Tensor:
        """Last hidden states (B, T, D) of whole sequences (B, T, D), each with an attention mask of its own."""
        length = embeds.shape[1]
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=torch.empty(rows, 1, length, length, dtype=torch.bool),
            position_ids=self.positions(rows, length),
            use_cache=False,
        ).last_hidden_state
