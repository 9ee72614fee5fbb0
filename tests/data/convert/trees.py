"""Small trees in the layouts in which the sets are distributed, with the faults that downloads have.

Paths are written out as in the sets, not taken from the descriptions that are tested.
"""

import json
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pydicom
import scipy.io
from pydicom.dataset import FileDataset, FileMetaDataset

SIZE = (48, 64)
TRUNCATED, MISSING, ORPHAN, OTHER_SIZE, EMPTY, DAMAGED = 2, 3, 4, 5, 6, 7
"""What is wrong with the case of that number; 0 and 1 are well."""


class Tree:
    """What was built, and what a conversion must say of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.masks: dict[tuple[str, str], np.ndarray] = {}
        """Id and lesion to (H, W) bool."""
        self.skipped: dict[str, str] = {}
        """Case to a word of the reason."""

    def path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def image(self, name: str, seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
        """A gray picture that looks like no other, the more so the less it is compressed."""
        small = np.random.default_rng(seed).integers(0, 255, (12, 16)).astype(np.uint8)
        picture = cv2.resize(small, size[::-1], interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(self.path(name)), picture)
        return picture

    def mask(self, name: str, mask: np.ndarray, value: int = 255) -> None:
        cv2.imwrite(str(self.path(name)), mask.astype(np.uint8) * value)

    def cut(self, name: str, share: float = 0.6) -> None:
        data = self.path(name).read_bytes()
        self.path(name).write_bytes(data[: int(len(data) * share)])

    def nifti(self, name: str, values: np.ndarray, affine: np.ndarray) -> None:
        nibabel.save(nibabel.Nifti1Image(values, affine), self.path(name))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def box(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A rectangle (H, W) bool; multiples of 8, so that JPEG keeps its border."""
    mask = np.zeros(size, bool)
    top, left = 8 * (1 + seed % 3), 8 * (1 + seed % 4)
    mask[top : top + 16, left : left + 24] = True
    return mask


PAIRS = {  # image, mask, id, lesion; {} is a number
    "isic2016": (
        "ISBI2016_ISIC_Part1_Training_Data/ISIC_000000{}.jpg",
        "ISBI2016_ISIC_Part1_Training_GroundTruth/ISIC_000000{}_Segmentation.png",
        "ISIC_000000{}",
        "skin lesion",
    ),
    "isic2017": (
        "test/ISIC-2017_Test_v2_Data/ISIC_001200{}.jpg",
        "test/ISIC-2017_Test_v2_Part1_GroundTruth/ISIC_001200{}_segmentation.png",
        "ISIC_001200{}",
        "skin lesion",
    ),
    "isic2018": (
        "ISIC2018_Task1-2_Training_Input/ISIC_000000{}.jpg",
        "ISIC2018_Task1_Training_GroundTruth/ISIC_000000{}_segmentation.png",
        "ISIC_000000{}",
        "skin lesion",
    ),
    "ph2": (
        "PH2Dataset/PH2 Dataset images/IMD00{0}/IMD00{0}_Dermoscopic_Image/IMD00{0}.bmp",
        "PH2Dataset/PH2 Dataset images/IMD00{0}/IMD00{0}_lesion/IMD00{0}_lesion.bmp",
        "IMD00{}",
        "pigmented lesion",
    ),
    "busi": (
        "Dataset_BUSI_with_GT/malignant/malignant ({}).png",
        "Dataset_BUSI_with_GT/malignant/malignant ({})_mask.png",
        "malignant-{}",
        "malignant breast tumour",
    ),
    "tn3k": (
        "Thyroid Dataset/tn3k/test-image/000{}.jpg",
        "Thyroid Dataset/tn3k/test-mask/000{}.jpg",
        "test-000{}",
        "thyroid nodule",
    ),
    "tg3k": (
        "Thyroid Dataset/tg3k/thyroid-image/000{}.jpg",
        "Thyroid Dataset/tg3k/thyroid-mask/000{}.jpg",
        "000{}",
        "thyroid gland",
    ),
    "ddti_png": (
        "DDTI dataset/DDTI/1_or_data/image/{}.PNG",
        "DDTI dataset/DDTI/1_or_data/mask/{}.PNG",
        "{}",
        "thyroid nodule",
    ),
    "kvasir_seg": ("Kvasir-SEG/images/cju{}dc.jpg", "Kvasir-SEG/masks/cju{}dc.jpg", "cju{}dc", "polyp"),
    "cvc_clinicdb": ("CVC-ClinicDB/Original/{}.tif", "CVC-ClinicDB/Ground Truth/{}.tif", "{}", "polyp"),
    "fusc2021": (
        "Foot Ulcer Segmentation Challenge/train/images/000{}.png",
        "Foot Ulcer Segmentation Challenge/train/labels/000{}.png",
        "train-000{}",
        "foot ulcer",
    ),
}

VOLUMES = {  # image, labels, id, lesion, its value, stored axes
    "isles2022": (
        "ISLES-2022/sub-strokecase000{0}/ses-0001/dwi/sub-strokecase000{0}_ses-0001_dwi.nii.gz",
        "ISLES-2022/derivatives/sub-strokecase000{0}/ses-0001/sub-strokecase000{0}_ses-0001_msk.nii.gz",
        "strokecase000{}",
        "ischaemic stroke lesion",
        1,
        "LAS",
    ),
    "atlas": (
        "ATLAS_2/Training/R001/sub-r001s00{0}/ses-1/anat/sub-r001s00{0}_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz",
        "ATLAS_2/Training/R001/sub-r001s00{0}/ses-1/anat/"
        "sub-r001s00{0}_ses-1_space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask.nii.gz",
        "r001s00{}",
        "chronic stroke lesion",
        1,
        "RAS",
    ),
    "wmh": (
        "training/Amsterdam/GE3T/10{}/pre/FLAIR.nii.gz",
        "training/Amsterdam/GE3T/10{}/wmh.nii.gz",
        "10{}",
        "white matter hyperintensity",
        1,
        "RAS",
    ),
    "open_ms": (
        "open_ms_data/cross_sectional/coregistered/patient0{}/FLAIR.nii.gz",
        "open_ms_data/cross_sectional/coregistered/patient0{}/consensus_gt.nii.gz",
        "patient0{}",
        "white matter lesion",
        1,
        "LPS",
    ),
    "mslesseg": (
        "MSLesSeg Dataset/train/P{0}/T1/P{0}_T1_FLAIR.nii.gz",
        "MSLesSeg Dataset/train/P{0}/T1/P{0}_T1_MASK.nii.gz",
        "P{}_T1",
        "multiple sclerosis lesion",
        1,
        "LAS",
    ),
    "lits": (
        "Training Batch 1/volume-{}.nii",
        "segmentations/segmentation-{}.nii",
        "{}",
        "liver tumour",
        2,
        "LPS",
    ),
    "kits": (
        "kits23/dataset/case_0000{}/imaging.nii.gz",
        "kits23/dataset/case_0000{}/segmentation.nii.gz",
        "case_0000{}",
        "kidney tumour",
        2,
        "SPL",  # slices are stored first
    ),
    "msd_colon": (
        "Task10_Colon/imagesTr/colon_00{}.nii.gz",
        "Task10_Colon/labelsTr/colon_00{}.nii.gz",
        "colon_00{}",
        "colon cancer",
        1,
        "LAS",
    ),
    "msd_lung": (
        "Task06_Lung/imagesTr/lung_00{}.nii.gz",
        "Task06_Lung/labelsTr/lung_00{}.nii.gz",
        "lung_00{}",
        "lung tumour",
        1,
        "RAS",
    ),
    "msd_pancreas": (
        "Task07_Pancreas/imagesTr/pancreas_00{}.nii.gz",
        "Task07_Pancreas/labelsTr/pancreas_00{}.nii.gz",
        "pancreas_00{}",
        "pancreatic tumour",
        2,
        "RAS",
    ),
    "msd_hepatic_vessel": (
        "Task08_HepaticVessel/imagesTr/hepaticvessel_00{}.nii.gz",
        "Task08_HepaticVessel/labelsTr/hepaticvessel_00{}.nii.gz",
        "hepaticvessel_00{}",
        "hepatic tumour",
        2,
        "LAS",
    ),
}


def pairs(tree: Tree, name: str) -> None:
    """Eight cases, of which three are well, one of them without a lesion."""
    image, mask, case, lesion = PAIRS[name]
    for number in range(8):
        drawn = box(number) & (number != EMPTY)
        if number != ORPHAN:
            tree.image(image.format(number), number)
        if number != MISSING:
            tree.mask(mask.format(number), drawn[:-8] if number == OTHER_SIZE else drawn)
        if number in (0, 1, EMPTY):
            tree.masks[f"{name}/{case.format(number)}", lesion if drawn.any() else "none"] = drawn
    tree.cut(image.format(TRUNCATED))
    tree.path(mask.format(DAMAGED)).write_text("<html>404</html>")
    tree.path(str(Path(image.format(0)).with_name("._" + Path(image.format(0)).name))).write_text("of a Mac")
    reasons = {
        TRUNCATED: "damaged or cut short|not an image",
        MISSING: "no mask",
        OTHER_SIZE: "64x40",
        DAMAGED: "not an image",
    }
    tree.skipped |= {case.format(number): word for number, word in reasons.items()}
    tree.skipped[mask.format(ORPHAN)] = "no image"


def affine_of(codes: str, sizes=(1.0, 1.0, 3.0)) -> np.ndarray:
    """Of voxels whose axes run as the codes say."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, code in enumerate(codes):
        place = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}[code]
        affine[place, axis] = sizes[place] * (-1 if code in "LPI" else 1)
    return affine


def stored(canonical: np.ndarray, codes: str) -> np.ndarray:
    """(x to the right, y to the front, z to the head) as a file with such axes holds it."""
    place = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}
    turned = canonical.transpose([place[code] for code in codes])
    return np.ascontiguousarray(turned[tuple(slice(None, None, -1 if code in "LPI" else 1) for code in codes)])


def head(seed: int, shape=(24, 28, 6)) -> np.ndarray:
    """A volume (x, y, z) int16 that is not symmetric."""
    return np.random.default_rng(seed).integers(-200, 400, shape).astype(np.int16)


def lesions(seed: int, value: int, shape=(24, 28, 6)) -> np.ndarray:
    """Labels (x, y, z) uint8: an organ of 1 where the lesion is more, and a lesion in the slices 2 and 3."""
    labels = np.zeros(shape, np.uint8)
    if value > 1:
        labels[2:20, 2:24, 1:5] = 1
    labels[4:10, 6 + seed : 12 + seed, 2:4] = value
    return labels


def view(volume: np.ndarray, place: int) -> np.ndarray:
    """An axial slice (H, W): front up, the patient's right at the left."""
    return np.array([[volume[x, y, place] for x in range(volume.shape[0])] for y in reversed(range(volume.shape[1]))])[
        :, ::-1
    ]


def volumes(tree: Tree, name: str) -> None:
    """Eight cases, of which three are well, one of them without a lesion."""
    image, mask, case, lesion, value, codes = VOLUMES[name]
    affine = affine_of(codes)
    for number in range(8):
        labels = lesions(number, value)
        if number == EMPTY:
            labels[labels == value] = 0
        if number != ORPHAN:
            tree.nifti(image.format(number), stored(head(number), codes), affine)
        if number != MISSING:
            written = labels[:-2] if number == OTHER_SIZE else labels
            other = affine_of("LIP") if number == DAMAGED else affine
            tree.nifti(mask.format(number), stored(written, codes), other)
        if number in (0, 1):
            for place in (2, 3):
                stem = f"{name}/{case.format(number)}-z00{place}" + ("-kidney-tumour" if name == "kits" else "")
                tree.masks[stem, lesion] = view(labels == value, place)
    place = 3  # the middle of all slices, and of those with an organ
    key = f"{name}/{case.format(EMPTY)}-z00{place}", "none"
    tree.masks[key] = np.zeros(view(head(0), 0).shape, bool)
    tree.cut(image.format(TRUNCATED))
    reasons = {
        TRUNCATED: "cut short|not a NIfTI",
        MISSING: "no file like",
        OTHER_SIZE: "resample",
        DAMAGED: "headers|resample",
    }
    tree.skipped |= {case.format(number): word for number, word in reasons.items()}
    tree.skipped[mask.format(ORPHAN)] = "no image"


def kits(tree: Tree) -> None:
    """With a kidney that has a cyst too."""
    volumes(tree, "kits")
    labels = lesions(0, 2)
    labels[14:18, 4:9, 3] = 3
    folder = "kits23/dataset/case_00008"
    tree.nifti(f"{folder}/imaging.nii.gz", stored(head(8), "SPL"), affine_of("SPL"))
    tree.nifti(f"{folder}/segmentation.nii.gz", stored(labels, "SPL"), affine_of("SPL"))
    for place in (2, 3):
        tree.masks[f"kits/case_00008-z00{place}-kidney-tumour", "kidney tumour"] = view(labels == 2, place)
    tree.masks["kits/case_00008-z003-kidney-cyst", "kidney cyst"] = view(labels == 3, 3)


def brats2021(tree: Tree) -> None:
    _brats(tree, "BraTS2021_0000{0}/BraTS2021_0000{0}_{1}.nii.gz", ("flair", "t1ce"), 4, "brats2021/BraTS2021_0000{}")


def brats2023(tree: Tree) -> None:
    stem = "TrainingData/BraTS-GLI-0000{0}-000/BraTS-GLI-0000{0}-000-{1}.nii.gz"
    _brats(tree, stem, ("t2f", "t1c"), 3, "brats2023/BraTS-GLI-0000{}-000")


def _brats(tree: Tree, path: str, sequences: tuple[str, str], enhancing: int, case: str) -> None:
    for number in range(4):
        labels = lesions(number, 2)
        labels[labels == 1] = 0
        labels[15:21, 15:21, 2] = enhancing
        labels[16:20, 16:20, 2] = 1
        for order, sequence in enumerate(sequences):
            if number != MISSING or order == 0:
                tree.nifti(path.format(number, sequence), stored(head(2 * number + order), "LPS"), affine_of("LPS"))
        tree.nifti(path.format(number, "seg"), stored(labels, "LPS"), affine_of("LPS"))
        if number < 2:
            for place in (2, 3):
                key = case.format(number) + f"-z00{place}-FLAIR-peritumoral-oedema"
                tree.masks[key, "peritumoral oedema"] = view(labels == 2, place)
            for lesion, value in (("enhancing tumour", enhancing), ("necrotic tumour core", 1)):
                key = case.format(number) + "-z002-contrast-" + lesion.replace(" ", "-")
                tree.masks[key, lesion] = view(labels == value, 2)
    tree.cut(path.format(TRUNCATED, sequences[1]))
    name = case.partition("/")[2]
    tree.skipped |= {name.format(TRUNCATED): "cut short|not a NIfTI", name.format(MISSING): "no file like"}


def emidec(tree: Tree) -> None:
    """Stacks of thick slices, whose axes are stored as coronal here, as oblique ones may be."""
    affine = affine_of("RSA", (1.5, 10.0, 1.5))
    for name in ("Case_P001", "Case_P002", "Case_N006", "Case_P003"):
        labels = np.zeros((24, 28, 6), np.uint8)  # x, z, y: six coronal slices
        labels[2:20, 2:24, :] = 2
        if name != "Case_N006":
            labels[4:10, 6:12, 2] = 3
            labels[5:9, 7:11, 2] = 4
        tree.nifti(f"emidec-dataset-1.0.1/{name}/Images/{name}.nii.gz", head(len(tree.masks)), affine)
        tree.nifti(f"emidec-dataset-1.0.1/{name}/Contours/{name}.nii.gz", labels, affine)
        if name in ("Case_P001", "Case_P002"):
            stem = f"emidec/{name}-z002"
            tree.masks[f"{stem}-myocardial-infarction", "myocardial infarction"] = view(labels >= 3, 2)
            tree.masks[f"{stem}-no-reflow-area", "no-reflow area"] = view(labels == 4, 2)
    tree.masks["emidec/Case_N006-z003", "none"] = np.zeros((28, 24), bool)
    tree.cut("emidec-dataset-1.0.1/Case_P003/Contours/Case_P003.nii.gz", 0.3)
    tree.skipped["Case_P003"] = "cut short|not a NIfTI"


def busi(tree: Tree) -> None:
    """With two tumours in one image, and a normal breast."""
    pairs(tree, "busi")
    folder = "Dataset_BUSI_with_GT"
    both = np.zeros(SIZE, bool)
    tree.image(f"{folder}/benign/benign (100).png", 100)
    for ending, seed in (("", 0), ("_1", 5)):
        tree.mask(f"{folder}/benign/benign (100)_mask{ending}.png", box(seed))
        both |= box(seed)
    tree.masks["busi/benign-100", "benign breast tumour"] = both
    tree.image(f"{folder}/normal/normal (1).png", 101)
    tree.mask(f"{folder}/normal/normal (1)_mask.png", np.zeros(SIZE, bool))
    tree.masks["busi/normal-1", "none"] = np.zeros(SIZE, bool)


def drac2022(tree: Tree) -> None:
    folders = {
        "intraretinal microvascular abnormality": "1. Intraretinal Microvascular Abnormalities",
        "nonperfusion area": "2. Nonperfusion Areas",
        "neovascularization": "3. Neovascularization",
    }
    root = "A. Segmentation"
    for number in range(4):
        tree.image(f"{root}/1. Original Images/a. Training Set/{number}.png", number)
    has = {0: list(folders), 1: ["nonperfusion area"], TRUNCATED: ["neovascularization"], 9: ["neovascularization"]}
    for number, names in has.items():
        for place, lesion in enumerate(names):
            path = f"{root}/2. Groundtruths/a. Training Set/{folders[lesion]}/{number}.png"
            tree.mask(path, box(number + place))
            if number < 2:
                tree.masks[f"drac2022/{number}-{lesion.replace(' ', '-')}", lesion] = box(number + place)
    tree.cut(f"{root}/1. Original Images/a. Training Set/{TRUNCATED}.png")
    tree.skipped |= {str(TRUNCATED): "cut short", str(MISSING): "no mask", path: "no image"}


def amd_sd(tree: Tree) -> None:
    colours = {
        "subretinal fluid": (255, 0, 0),
        "intraretinal fluid": (0, 255, 0),
        "pigment epithelial detachment": (0, 0, 255),
        "subretinal hyperreflective material": (255, 255, 0),
        "ellipsoid zone disruption": (255, 0, 255),
    }
    for number in range(4):
        path = f"AMD-SD/images/12{number}/12{number}_7.png"
        picture = np.repeat(tree.image(path, number)[..., None], 3, axis=2)
        labels = np.zeros_like(picture)
        for place, (lesion, colour) in enumerate(colours.items()):
            if (number + place) % 2 == 0 and number != 3:
                labels[8 * place : 8 * place + 8, 8:40] = np.array(colour) * 0.9  # as blended borders are
                mask = np.zeros(SIZE, bool)
                mask[8 * place : 8 * place + 8, 8:40] = True
                if number < 2:
                    tree.masks[f"amd_sd/12{number}_7-{lesion.replace(' ', '-')}", lesion] = mask
        cv2.imwrite(str(tree.path(path)), np.hstack([picture, labels])[..., ::-1])
    tree.masks["amd_sd/123_7", "none"] = np.zeros(SIZE, bool)
    tree.cut("AMD-SD/images/122/122_7.png")
    tree.image("AMD-SD/images/124/124_1.png", 9, (48, 65))
    tree.skipped |= {"122_7": "cut short", "124_1": "no half"}


def ddti(tree: Tree) -> None:
    """Case 1 has two images, one with two nodules; 2 is cut short; 3 has no outline; of 4 an image is missing."""

    def xml(case: int, marks: list[tuple[int, str]]) -> None:
        body = "".join(f"<mark><image>{image}</image><svg>{svg}</svg></mark>" for image, svg in marks)
        tree.path(f"DDTI/{case}.xml").write_text(f"<case><number>{case}</number><tirads>4a</tirads>{body}</case>")

    def svg(*boxes: tuple[int, int, int, int]) -> str:
        corners = [[(x1, y1), (x2, y1), (x2, y2), (x1, y2)] for x1, y1, x2, y2 in boxes]
        points = [[{"x": x, "y": y} for x, y in corner] for corner in corners]
        return json.dumps([{"points": point, "annotation": {}, "regionType": "freehand"} for point in points])

    for seed, name in enumerate(("1_1", "1_2", "2_1", "3_1", "4_1", "5_1")):
        tree.image(f"DDTI/{name}.jpg", seed)
    xml(1, [(1, svg((8, 8, 20, 20), (30, 30, 40, 40))), (2, svg((10, 5, 30, 25)))])
    xml(2, [(1, svg((8, 8, 20, 20))[:-20])])
    xml(3, [(1, "")])
    xml(4, [(1, svg((8, 8, 20, 20))), (2, svg((8, 8, 20, 20)))])
    xml(6, [(1, svg((8, 8, 20, 20)))])
    for name, boxes in (
        ("1_1", [(8, 8, 20, 20), (30, 30, 40, 40)]),
        ("1_2", [(10, 5, 30, 25)]),
        ("4_1", [(8, 8, 20, 20)]),
    ):
        mask = np.zeros(SIZE, bool)
        for x1, y1, x2, y2 in boxes:
            mask[y1 : y2 + 1, x1 : x2 + 1] = True
        tree.masks[f"ddti/{name}", "thyroid nodule"] = mask
    tree.skipped |= {"2_1": "damaged", "3_1": "no outline", "5_1": "no mask", "DDTI/6.xml": "no image"}
    tree.skipped["DDTI/4.xml: image 2"] = "no such image"


def dicom(path: Path, values: np.ndarray, jpeg: bool = False, **tags) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit if jpeg else pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = values.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * values.itemsize
    data.HighBit, data.PixelRepresentation = 8 * values.itemsize - 1, int(values.dtype.kind == "i")
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.tobytes()
    if jpeg:
        data.PixelData = pydicom.encaps.encapsulate([cv2.imencode(".jpg", values)[1].tobytes()])
        data["PixelData"].is_undefined_length = True
    data.save_as(path, enforce_file_format=True)


def siim_acr(tree: Tree) -> None:
    """A and B are of one patient, C has no pneumothorax, D two rows, E no row, F is cut short, G leaves the image."""

    def runs(mask: np.ndarray) -> str:
        """As the set's mask2rle: gap and length in turn, down the columns."""
        gap, text, length = 0, [], 0
        for value in mask.T.ravel():
            if value:
                length += 1
            elif length:
                text += [gap, length]
                gap, length = 1, 0
            else:
                gap += 1
        return " ".join(map(str, text))

    one, two = box(0), box(5)
    rows = {"A": [one], "B": [two], "C": [], "D": [one, two], "F": [one], "G": [one]}
    lines = ["ImageId, EncodedPixels"]
    for number, name in enumerate("ABCDEFG"):
        picture = np.random.default_rng(number).integers(0, 255, (6, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        path = tree.path(f"siim/dicom-images-train/1.2.{number}/1.3.{number}/{name}.dcm")
        dicom(path, picture, jpeg=True, PatientID="p0" if name in "AB" else f"p{number + 1}")
        lines += [f"{name}, {runs(mask)}" for mask in rows.get(name, [])]
    lines += ["C, -1", "H, 1 2"]
    lines = [line if line[0] != "G" else "G, 3000 200" for line in lines]
    tree.path("siim/train-rle.csv").write_text("\n".join(lines) + "\n")
    for name, mask in (("A", one), ("B", two), ("C", one & False), ("D", one | two)):
        tree.masks[f"siim_acr/{name}", "pneumothorax" if mask.any() else "none"] = mask
    data = (tree.root / "siim/dicom-images-train/1.2.5/1.3.5/F.dcm").read_bytes()
    (tree.root / "siim/dicom-images-train/1.2.5/1.3.5/F.dcm").write_bytes(data[: len(data) // 4])
    tree.skipped |= {"E": "no row", "F": "cannot|not a DICOM", "G": "leave the image"}
    tree.skipped["siim/train-rle.csv: H"] = "no image for this row"


def fumpe(tree: Tree) -> None:
    """Slices are in the order of the names of their files, D2 before D10; PAT003 lacks one, PAT004 has no table."""
    for number in range(1, 6):
        name = f"PAT00{number}"
        labels = np.zeros((24, 20, 11), np.uint8)
        labels[4:10, 6:12, 9] = 1
        for place in range(11 - (number == 3)):
            values = np.full((24, 20), 100 * place, np.int16)
            values[0, 0], values[1, 1] = 1024, 1100 + 40 * number  # no two patients look alike
            dicom(tree.path(f"FUMPE/CT_scans/{name}/D{place}.dcm"), values, RescaleSlope=1, RescaleIntercept=-1024)
        if number != 4:
            scipy.io.savemat(tree.path(f"FUMPE/GroundTruth/{name}.mat"), {"Mask": labels}, do_compression=True)
        if number < 3:
            tree.masks[f"fumpe/{name}-z009", "pulmonary embolism"] = labels[..., 9].astype(bool)
    tree.cut("FUMPE/GroundTruth/PAT005.mat", 0.7)
    tree.skipped |= {"PAT003": "10 DICOM files", "PAT004": "no file like", "PAT005": "not a MAT file"}


TREES = {name: lambda tree, name=name: pairs(tree, name) for name in PAIRS}
TREES |= {name: lambda tree, name=name: volumes(tree, name) for name in VOLUMES}
TREES |= {build.__name__: build for build in (busi, kits, drac2022, amd_sd, ddti, siim_acr, fumpe, emidec)}
TREES |= {build.__name__: build for build in (brats2021, brats2023)}
