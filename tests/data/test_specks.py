import numpy as np

from lab.data.sample import without_specks


def test_specks_beside_a_lesion_go_and_equals_stay():
    mask = np.zeros((64, 64), bool)
    mask[4:24, 4:24] = mask[40:50, 40:50] = True
    speck = mask.copy()
    speck[60, 60] = True
    assert (without_specks(speck) == mask).all()
    alone = np.zeros_like(mask)
    alone[60, 60] = True
    assert (without_specks(alone) == alone).all() and not without_specks(np.zeros_like(mask)).any()
