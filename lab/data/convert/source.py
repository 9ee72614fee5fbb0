"""What is said about a public set: where its files lie, what its labels mean, how it is split. No code a set."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lab.errors import LabError

WINDOWS = {
    "abdomen": (-150.0, 250.0),
    "liver": (-45.0, 105.0),
    "lung": (-1350.0, 150.0),
    "pulmonary arteries": (-250.0, 450.0),
    "brain": (0.0, 80.0),
}
"""Hounsfield units that are told apart, by what is looked at: the usual centre 50 and width 400, 30 and 150, -600 and
1500, 100 and 700, 40 and 80."""


@dataclass(frozen=True)
class Lesion:
    """One class of lesion: a sample of its own, asked for by name."""

    name: str
    """Plain words; may hold fields of the image's pattern, such as `{kind} breast tumour`."""
    values: tuple[int | tuple[int, int, int], ...] = ()
    """Its label values (of a palette image, indices), or RGB colours; none: all that is foreground (see
    `lab.data.convert.images.foreground`)."""
    mask: str = ""
    """Pattern of its masks, where each lesion has files of its own; else the source's."""
    image: str = ""
    """Pattern of the image that shows it, where that is another than the source's, such as another MRI sequence."""
    modality: str = ""
    """Of that image."""


@dataclass(frozen=True)
class Source:
    """A set as it is distributed.

    A pattern is a path below the root in which `{field}` stands for one part of a name, `{field:regex}` for one that
    looks so, `{base}` for any leading folders and `*` for anything but a slash; `.*` at the end is an extension, the
    last one or `.nii.gz`. Files whose common fields (`base` aside) are equal belong together.
    """

    name: str
    kind: Literal["pairs", "halves", "polygons", "rle", "volumes", "series"]
    """pairs: image and mask files. halves: the image's right half is its mask. polygons: outlines in DDTI's XML.
    rle: DICOM and a table of run lengths. volumes: NIfTI, sliced. series: DICOM slices and a MAT file, sliced."""
    image: str
    """Pattern of the images, each of which is a case; its fields are those that other entries may use."""
    lesions: tuple[Lesion, ...]
    modality: str
    anatomy: str
    license: str
    seen: str
    """Where this layout was read: a page, or public code that reads the set."""
    mask: str = ""
    """Pattern of the masks (of the XML, the table, the MAT file)."""
    note: str = ""
    """What could not be verified, and what to know."""
    case: str = "{name}"
    """Name of a case within the set."""
    group: str = ""
    """Patient, sequence: what must stay in one split; the case where nothing is said."""
    namespace: str = ""
    """Begins the names of groups; sets that share images share it. The set's name where nothing is said."""
    splits: dict[str, str] = field(default_factory=dict)
    """Official splits by the field `part`: train, val, test, or trainval, which is divided by hash of the group.
    Without, groups are divided by hash."""
    window: str = ""
    """CT: a name in WINDOWS. Without, values from the 0.5th to the 99.5th percentile are told apart."""
    plane: Literal["axial", "coronal", "sagittal", "thickest"] = "axial"
    """Volumes: how they are sliced; thickest is along the axis whose voxels are longest, for oblique stacks."""
    most: int = 4
    """Volumes: slices for each lesion class, the largest area and others evenly spread; where a slice holds other
    classes too, they are asked for as well. A volume without any lesion gives one slice, whose lesion is none."""
    least: int = 16
    """Volumes: lesion pixels that a slice must have to be taken for it."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise LabError(f"description of '{self.name}': {problem}")

    def _problems(self):
        if not self.lesions:
            yield "no lesions are named; name one"
        if self.window and self.window not in WINDOWS:
            yield f"window '{self.window}' is unknown; choose from {', '.join(WINDOWS)}"
        if wrong := set(self.splits.values()) - {"train", "val", "test", "trainval"}:
            yield f"split '{wrong.pop()}' is unknown; use train, val, test or trainval"
        if self.most < 1 or self.least < 1:
            yield "most and least must be at least 1; raise them"
        known = set(matcher(self.image).groupindex)
        uses = [self.case, self.group, *(lesion.name for lesion in self.lesions)]
        for text in (*uses, *self.patterns()):
            if extra := {name for name, _ in _FIELD.findall(text) if name} - known - {"base"}:
                yield f"'{text}' uses {{{extra.pop()}}}, which the image's pattern '{self.image}' does not have; add it"
        if self.kind == "polygons" and "image" not in known:
            yield f"pattern '{self.image}' has no {{image}}, by which XML numbers the images of a case; add it"
        if self.kind != "halves" and any(not self.mask_of(lesion) for lesion in self.lesions):
            yield "there is no pattern for the masks; give mask"

    def mask_of(self, lesion: Lesion) -> str:
        """Pattern of a lesion's masks; empty where they are in the image file."""
        return lesion.mask or self.mask

    def image_of(self, lesion: Lesion) -> str:
        """Pattern of the image that shows a lesion."""
        return lesion.image or self.image

    def patterns(self) -> tuple[str, ...]:
        """All patterns but the image's, each once."""
        used = {pattern for lesion in self.lesions for pattern in (self.mask_of(lesion), self.image_of(lesion))}
        return tuple(sorted(used - {self.image, ""}))


_FIELD = re.compile(r"\{(\w+)(?::([^{}]+))?\}|\*")


def matcher(pattern: str) -> re.Pattern:
    """A pattern as a regular expression for whole paths, relative to the root, with slashes."""
    text, end, names = "", 0, set()
    for part in _FIELD.finditer(pattern):
        text += re.escape(pattern[end : part.start()])
        end = part.end()
        name, looks = part.groups()
        if name is None and end == len(pattern) and text.endswith(r"\."):
            text += r"(?:nii\.gz|[^/.]+)"  # so that a name keeps its dots
        elif name is None:
            text += "[^/]*"
        elif name == "base":
            text += "(?:.*/)?"
        elif name in names:
            text += f"(?P={name})"
        else:
            text += f"(?P<{name}>{looks or '[^/]+?'})"
            names.add(name)
    try:
        return re.compile(text + re.escape(pattern[end:]))
    except re.error as error:
        raise LabError(f"pattern '{pattern}' is not one that can be read ({error}); correct it") from None


def filled(text: str, fields: dict[str, str]) -> str:
    """A text with the fields of a case in it."""
    return _FIELD.sub(lambda part: fields[part[1]], text)


def read_description(path: Path) -> Source:
    """A set of your own, described in a YAML file with the fields of `Source`; examples are in `configs/convert/`.

    Raises:
        LabError: What is wrong in it.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Source)
    try:
        return Source(**vars(parser.instantiate_classes(parser.parse_path(path))))
    except (ArgumentError, TypeError) as error:
        raise LabError(f"description '{path}' cannot be used ({' '.join(str(error).split())}); correct it") from None
