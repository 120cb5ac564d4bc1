import hashlib

import numpy as np
import pytest
import sklearn.datasets

from jaxssl.contracts import UserError
from jaxssl.data import loading

DATA = {"name": "digits", "root": "", "split": "100", "seed": 0}


@pytest.fixture(scope="module")
def published():
    return sklearn.datasets.load_digits()


@pytest.mark.parametrize("size", [8, 32])
def test_digits_are_scikit_learns(published, size):
    source = loading.load(DATA | {"size": size}, "train+val", labels=True)
    assert source.ids == tuple(f"digit_{i:04d}" for i in range(1797))
    assert source.info.classes == tuple("0123456789")
    np.testing.assert_array_equal(source.class_ids, published.target)
    for i in range(0, 1797, 13):
        image, square = source[i]["image"], size // 8
        assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
        for y, x in np.ndindex(8, 8):
            block = image[square * y : square * (y + 1), square * x : square * (x + 1)]
            assert (block == round(published.images[i, y, x] * 255 / 16)).all()
        assert source[i]["label"] == published.target[i]


def test_parts_are_fixed_and_alike():
    train, val = (loading.load(DATA, part, labels=True) for part in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert set(train.ids).isdisjoint(val.ids)
    assert np.bincount(val.class_ids).tolist() == [36] * 10
    digest = hashlib.sha256("\n".join(val.ids).encode()).hexdigest()
    assert digest.startswith("5b371a0ef2be0e28")  # results of other versions compare


def test_no_label_without_asking():
    source = loading.load(DATA, "val", labels=False, ids=[])
    assert len(source) == 0
    (image_id, *_) = loading.load(DATA, "val", labels=True).ids
    (record,) = loading.load(DATA, "val", labels=False, ids=[image_id])
    assert set(record) == {"image", "id"}


@pytest.mark.parametrize("size", [4, 12, 0.5])
def test_other_sizes_are_refused(size):
    with pytest.raises(UserError, match=r"data\.size=.*whole factor.*--config\.data\.size=32"):
        loading.load(DATA | {"size": size}, "train", labels=True)
    with pytest.raises(UserError, match=r"has no split 'test'\. Choose one of: train, val"):
        loading.load(DATA, "test", labels=True)
