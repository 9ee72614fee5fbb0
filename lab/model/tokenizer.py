"""Makes the tokenizer of the `small` reasoner: `python -m lab.model.tokenizer` writes `small_tokenizer.json` anew.

The corpus is the lab's own phrasings with common medical words, so that a sentence takes few tokens; byte-level
BPE spells everything else, so that no query is out of vocabulary.
"""

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lab.data.facts import Facts
from lab.data.reasoning import CONTRAST, COUNT, write
from lab.model.answer import render
from lab.model.pretrained import SEG
from lab.model.small import IMAGE, SMALL_TOKENIZER

SPECIAL = ["<pad>", "<eos>", IMAGE, SEG, "<user>", "<assistant>", "<think>", "</think>", "<answer>", "</answer>"]
MODALITIES = (
    "ultrasound,dermoscopy,MRI,CT,X-ray,colonoscopy,OCT,OCTA,visible-light photograph,fundus photograph,"
    "MRI FLAIR,MRI T1 contrast"
)
ANATOMIES = "breast,skin,brain,abdomen,colon,foot,kidney,lung,eye,thyroid,liver,pancreas,heart,prostate,neck,head"
LESIONS = (
    "benign breast tumour,malignant breast tumour,polyp,glioma,meningioma,pituitary,foot ulcer,pigmented lesion,"
    "exudate,pneumonia opacity,kidney tumour,white matter lesion,cyst,nodule,spiculated mass,naevus,melanoma,keratosis,"
    "haemangioma,infarct,tumour,ulcer,haemorrhage,necrosis,callus,bruise,oedema,plaque,pneumothorax,metastasis,drusen,"
    "thyroid nodule"
)
QUERIES = (
    "Locate and segment the {} in this {} {}.",
    "Where is the {}? Segment it.",
    "Find the {} and outline it.",
    "Segment the larger of the dark ones.",
    "Segment the smaller of the bright ones.",
    "Find the lesion furthest to the left and outline it.",
    "Segment the lesion furthest to the right.",
    "Where is the lesion with the irregular outline? Segment it.",
    "Locate and segment the largest lesion with the blurred margin.",
    "Segment the smallest round lesion with the sharp margin.",
)
TEXTS = 4000
VOCABULARY = 2048


def corpus(rng: np.random.Generator) -> Iterator[str]:
    """Random queries and answers with every word and every coordinate 0..100 in them."""
    locations = [f"{row}{column}" for row in ("upper ", "", "lower ") for column in ("left", "centre", "right")]
    vocabularies = (locations, ["tiny", "small", "medium", "large"], list(CONTRAST), ["sharp", "blurred"])
    vocabularies += (["round", "oval", "irregular"], [*COUNT, "none"])
    names = [words.split(",") for words in (MODALITIES, ANATOMIES, LESIONS)]
    for _ in range(TEXTS):
        facts = Facts(*(str(rng.choice(words)) for words in vocabularies))
        modality, anatomy, lesion = (str(rng.choice(words)) for words in names)
        boxes = np.sort(rng.random((rng.integers(0, 5), 2, 2)), axis=1).reshape(-1, 4)
        yield str(rng.choice(QUERIES)).format(lesion, anatomy, modality)
        yield render(write(facts, modality, anatomy, lesion, rng), lesion, boxes, 100)


def train_tokenizer() -> Tokenizer:
    """The tokenizer, the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(np.random.default_rng(0)), trainer)
    return tokenizer


if __name__ == "__main__":
    train_tokenizer().save(str(SMALL_TOKENIZER))
    print(f"wrote {SMALL_TOKENIZER}")
