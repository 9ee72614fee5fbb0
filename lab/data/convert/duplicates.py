"""Near-duplicates: images that look alike must not be on both sides of a split."""

import imagehash
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

NEAR = 24
"""Bits of 256 in which near-duplicates may differ. On the nine sets of ../shared/data, 1 of 0.9 million pairs of
different groups is as near, and 84 % of BUSI's known near-duplicates are."""


def look(image: np.ndarray) -> str:
    """Perceptual hash of an image (H, W, 3) uint8, 256 bits as 64 hexadecimal digits (pHash of `imagehash`)."""
    return str(imagehash.phash(Image.fromarray(image), hash_size=16))


def alike(groups: list[str], looks: list[str]) -> list[int]:
    """Numbers such that images of one group, and those whose looks are near, directly or in a chain, share one.

    Args:
        groups: N names.
        looks: N hashes; empty where an image is not to be compared.
    """
    first: dict[str, int] = {}
    edges = [(first.setdefault(group, place), place) for place, group in enumerate(groups)]
    places = np.array([place for place, text in enumerate(looks) if text], np.int64)
    if len(places):
        bits = np.frombuffer(bytes.fromhex("".join(text for text in looks if text)), np.uint64).reshape(len(places), 4)
        for start in range(0, len(bits), 256):
            apart = np.bitwise_count(bits[start : start + 256, None] ^ bits[None, start:]).sum(-1)
            rows, columns = np.nonzero(apart <= NEAR)
            edges += zip(places[start + rows].tolist(), places[start + columns].tolist())
    rows, columns = np.array(edges, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(len(groups), len(groups)))
    return connected_components(graph, directed=False)[1].tolist()
