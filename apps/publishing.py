"""The commands that make of a model what others can use."""

import json
from pathlib import Path


def release(
    checkpoint: Path,
    folder: Path,
    title: str = "CORE-Seg tiny",
    data: str = "see the run's config_fit.yaml",
    *,
    evaluations: list[Path] | None = None,
    gallery: Path | None = None,
    mirrored: bool | None = None,
    threshold: float | None = None,
    corroborate: bool | None = None,
    adapter: bool = False,
):
    """Write what can be shared of one of your own checkpoints: safetensors, config, tokenizer and card.

    Args:
        checkpoint: checkpoints/last.ckpt of a run, or a release, to be written anew.
        folder: Where to.
        title: Title of the model card.
        data: What the model was trained on, for the card.
        evaluations: Folders that core-seg evaluate wrote about it, for the card.
        gallery: One of these folders whose pictures of the four worst cases you may share; the card shows them.
        mirrored: Segment the mirror image too, and average; None leaves it as the model has it.
        threshold: Probability above which a pixel is lesion; choose it on val. None leaves it as the model has it.
        corroborate: Keep only claims that the mask confirms, and draw boxes around it; None leaves it as it is.
        adapter: Leave out the weights that are still those of the checkpoints that training began with, which core-seg
            merge needs then.
    """
    from lab.errors import LabError
    from lab.model.base import base_of
    from lab.model.release import GALLERY, REASONER, load_any, save_release
    from lab.model.segmenter import Segmenter

    model = load_any(checkpoint)
    chosen = {"mirrored": mirrored, "threshold": threshold, "corroborate": corroborate}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if isinstance(model, Segmenter) and chosen:
        raise LabError(f"--{next(iter(chosen))} is of stage 1 and 2, but '{checkpoint}' is of stage 0; drop it")
    vars(model.config).update(chosen)
    base = None
    if adapter:
        if checkpoint.suffix != ".ckpt" or isinstance(model, Segmenter) or not model.config.reasoner.lora_rank:
            raise LabError(f"'{checkpoint}' is no checkpoint of a model with LoRA, which --adapter is for; drop it")
        place = Path(model.config.reasoner.model)
        if place.name == REASONER and (place.parent / "model.safetensors").is_file():
            raise LabError(
                f"'{checkpoint}' started from the release '{place.parent}', not from a checkpoint that others can "
                "complete an adapter with; drop --adapter"
            )
        base = base_of(model.config, model.config.reasoner.model, model.config.segmenter.weights)
    if gallery and not (gallery / GALLERY).is_file():
        raise LabError(f"'{gallery}' has no {GALLERY}; name a folder that core-seg evaluate wrote")
    found = [json.loads((path / "evaluation.json").read_text()) for path in evaluations or ()]
    save_release(model, folder, title, data, evaluations=found, base=base, gallery=gallery and gallery / GALLERY)
    print(f"wrote {folder} ({sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB)")


def merge(
    model: Path,
    folder: Path,
    title: str = "CORE-Seg",
    data: str = "see the run's config_fit.yaml",
    *,
    reasoner: str = "",
    segmenter: str | None = None,
):
    """Write a release whose LoRA, and trained row of <seg>, are part of the weights.

    Args:
        model: A release, or checkpoints/last.ckpt of a run.
        folder: Where to.
        title: Title of the model card.
        data: What the model was trained on, for the card.
        reasoner: Of a release written with --adapter true: path or hub id of the checkpoint that its card names.
        segmenter: The same of the segmenter.
    """
    from lab.errors import LabError
    from lab.model.release import complete, load_model, save_release

    if segmenter and not reasoner:
        raise LabError("--segmenter is for a release written with --adapter true, together with --reasoner; give both")
    core_seg = complete(model, reasoner, segmenter) if reasoner else load_model(model)
    if not core_seg.config.reasoner.lora_rank:
        raise LabError(f"'{model}' has no LoRA to merge; share it with core-seg release")
    core_seg.reasoner.model.float()  # what LoRA adds is lost where weights are rounded before it is added
    core_seg.reasoner.config.dtype = "float32"
    core_seg.reasoner.merge_lora()
    save_release(core_seg, folder, title, data)
    print(f"wrote {folder} (LoRA merged)")


def push(folder: Path, repo_id: str, *, private: bool = True, dry_run: bool = False):
    """Upload a release with its card to the Hugging Face hub, with the token of `hf auth login`.

    Args:
        folder: Of a release; one that cannot be loaded, or that holds anything else, is refused.
        repo_id: owner/name, made when there is no such repository.
        private: Of a repository that is made.
        dry_run: Check everything and list what would be uploaded, without network.
    """
    from lab.model.hub import push as upload

    for name in (files := upload(folder, repo_id, private, dry_run)):
        print(f"{(folder / name).stat().st_size / 1e6:9.2f} MB  {name}")
    print(f"{'would upload' if dry_run else 'uploaded'} {len(files)} files to https://huggingface.co/{repo_id}")
