"""How fast sets are converted: samples for each second of one core, in the layouts and sizes of real sets.

    python -m benchmarks.convert --out docs/results/convert.json

CPU seconds are counted, not those on the wall, so that other work on the machine does not count; one process, one
thread.
"""

import json
import tempfile
import time
from pathlib import Path

import cv2
import nibabel
import numpy as np
from pydicom.encaps import encapsulate
from pydicom.examples import get_path
from pydicom.filereader import dcmread
from pydicom.uid import JPEGBaseline8Bit

from benchmarks import run
from benchmarks.clock import PeakMemory
from lab.data.convert.run import convert
from lab.data.convert.sets import SETS
from lab.evaluation.report import machine


def smooth(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Noise (H, W) float32 in [0, 1] that compresses like an image, not like noise."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(rng.random((24, 24), np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(coarse + rng.normal(0, 0.02, shape), 0, 1).astype(np.float32)


def disc(shape: tuple[int, ...], radius: int) -> np.ndarray:
    return cv2.circle(np.zeros(shape, np.uint8), (shape[1] // 2, shape[0] // 3), radius, 1, -1)


def photographs(root: Path, cases: int) -> None:
    """ISIC 2018: JPEG of 3000 x 2000."""
    images, masks = root / "ISIC2018_Task1-2_Training_Input", root / "ISIC2018_Task1_Training_GroundTruth"
    images.mkdir()
    masks.mkdir()
    for case in range(cases):
        colour = np.dstack([smooth((2000, 3000), 3 * case + channel) for channel in range(3)])
        cv2.imwrite(str(images / f"ISIC_{case:07d}.jpg"), (colour * 255).astype(np.uint8))
        cv2.imwrite(str(masks / f"ISIC_{case:07d}_segmentation.png"), disc((2000, 3000), 300) * 255)


def small_photographs(root: Path, cases: int) -> None:
    """Kvasir-SEG: JPEG of 620 x 530."""
    for name in ("images", "masks"):
        (root / name).mkdir()
    for case in range(cases):
        colour = np.dstack([smooth((530, 620), 3 * case + channel) for channel in range(3)])
        cv2.imwrite(str(root / f"images/{case}.jpg"), (colour * 255).astype(np.uint8))
        cv2.imwrite(str(root / f"masks/{case}.jpg"), disc((530, 620), 90) * 255)


def volumes(root: Path, cases: int, stem: str, label: str, shape: tuple[int, int, int], value: int) -> None:
    labels = np.zeros(shape, np.uint8)
    labels[..., shape[2] // 3 : shape[2] // 2] = (disc(shape[:2], 20) * value)[..., None]
    for case in range(cases):
        for name in (stem, label):
            (root / name.format(case)).parent.mkdir(parents=True, exist_ok=True)
        plane = smooth(shape[:2], case) * 1200 - 500
        depth = np.random.default_rng(case).normal(0, 15, shape).astype(np.float32)
        nibabel.save(
            nibabel.Nifti1Image((plane[..., None] + depth).astype(np.int16), np.eye(4)), root / stem.format(case)
        )
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), root / label.format(case))


def liver(root: Path, cases: int) -> None:
    """MSD-like CT: .nii.gz of 512 x 512 x 120."""
    folder = "Task08_HepaticVessel/{}/hepaticvessel_00{{}}.nii.gz"
    volumes(root, cases, folder.format("imagesTr"), folder.format("labelsTr"), (512, 512, 120), 2)


def head(root: Path, cases: int) -> None:
    """ISLES-like MRI: .nii.gz of 112 x 112 x 73."""
    stem = "sub-strokecase000{0}/sub-strokecase000{0}_ses-0001_"
    volumes(root, cases, stem + "dwi.nii.gz", stem + "msk.nii.gz", (112, 112, 73), 1)


def chest(root: Path, cases: int) -> None:
    """SIIM-ACR: DICOM of 1024 x 1024, JPEG."""
    lines = ["ImageId, EncodedPixels"]
    for case in range(cases):
        folder = root / f"dicom-images-train/1.{case}/2.{case}"
        folder.mkdir(parents=True)
        data = dcmread(get_path("ct"))
        for name in ("RescaleSlope", "RescaleIntercept", "SmallestImagePixelValue", "LargestImagePixelValue"):
            if name in data:
                del data[name]
        data.Rows = data.Columns = 1024
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
        data.PatientID, data.file_meta.TransferSyntaxUID = str(case), JPEGBaseline8Bit
        data.PixelData = encapsulate(
            [cv2.imencode(".jpg", (smooth((1024, 1024), case) * 255).astype(np.uint8))[1].tobytes()]
        )
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
        data.save_as(folder / f"image{case}.dcm")
        lines.append(f"image{case}, 300000 {' '.join(['200 824'] * 100)} 200")
    (root / "train-rle.csv").write_text("\n".join(lines) + "\n")


def main(out: Path | None = None) -> None:
    """Measure and print; the last line is JSON.

    Args:
        out: JSON to write.
    """
    cv2.setNumThreads(1)
    plan = {
        "isic2018": (photographs, 12),
        "kvasir_seg": (small_photographs, 60),
        "siim_acr": (chest, 40),
        "isles2022": (head, 10),
        "msd_hepatic_vessel": (liver, 4),
    }
    found = {}
    for name, (build, cases) in plan.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, "root")
            root.mkdir()
            build(root, cases)
            with PeakMemory() as memory:
                start = time.process_time()
                done = convert(SETS[name], root, Path(folder, "out"))
                seconds = time.process_time() - start
        assert done.written == cases, done
        found[name] = {
            "layout": build.__doc__.splitlines()[0].rstrip("."),
            "samples": done.records,
            "samples_per_core_second": round(done.records / seconds, 1),
            "seconds_per_case": round(seconds / cases, 3),
            "megabytes": round(memory.megabytes),
        }
        print(name, found[name])
    result = {"sets": found, "size": 1024} | machine()
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
