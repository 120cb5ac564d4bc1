import gzip
import pickle
import shutil

import numpy as np
import pytest

from jaxssl.contracts import UnreadableError, UserError
from jaxssl.data import loading

COUNTS = {"train": 23, "t10k": 6}


def arrays(part, size=(28, 28)):
    rng = np.random.default_rng(COUNTS[part])
    images = rng.integers(0, 256, (COUNTS[part], *size), np.uint8)
    return images, rng.integers(0, 10, COUNTS[part], np.uint8)


def idx(array):
    """Two zero bytes, 8 for bytes, the number of dimensions; sizes of four bytes; the values."""
    sizes = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write(folder, size=(28, 28), name="{}-{}-idx{}-ubyte", pack=bytes):
    folder.mkdir(parents=True, exist_ok=True)
    for part in COUNTS:
        for kind, array in zip(("images", "labels"), arrays(part, size), strict=True):
            path = folder / name.format(part, kind, array.ndim)
            path.write_bytes(pack(idx(array)))
    return {"name": "mnist", "root": str(folder), "split": "10", "seed": 0}


@pytest.mark.parametrize("size", [(28, 28), (5, 8)])
@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("{}-{}-idx{}-ubyte", bytes),
        ("{}-{}-idx{}-ubyte.gz", gzip.compress),
        ("{}-{}.idx{}-ubyte", bytes),
        ("{}-{}.idx{}-ubyte.gz", gzip.compress),
    ],
)
def test_reads_what_is_published(tmp_path, name, pack, size):
    data = write(tmp_path, size, name, pack)
    for split, part, prefix in (("train", "train", "train"), ("val", "t10k", "test")):
        source = loading.load(data, split, labels=True)
        images, labels = arrays(part, size)
        assert source.ids == tuple(f"{prefix}_{i:05d}" for i in range(COUNTS[part]))
        for i in range(len(source)):
            record = source[i]
            assert record["image"].shape == (*size, 3)
            for channel in range(3):
                np.testing.assert_array_equal(record["image"][..., channel], images[i])
            assert record["label"] == labels[i]
        np.testing.assert_array_equal(source.class_ids, labels)
    assert (source.info.task, source.info.classes) == ("classification", tuple("0123456789"))


def test_names_of_fashion(tmp_path):
    source = loading.load(write(tmp_path) | {"set": "fashion"}, "val", labels=False)
    assert source.info.classes[:2] == ("T-shirt/top", "trouser")
    assert source.info.num_classes == 10
    with pytest.raises(UserError, match=r"data\.set='kmnist'.*mnist, fashion"):
        loading.load(write(tmp_path) | {"set": "kmnist"}, "val", labels=False)


def test_labels_of_unlabeled_images_are_never_opened(tmp_path):
    data = write(tmp_path)
    for path in tmp_path.glob("*labels*"):
        path.unlink()
    source = loading.load(data, "train", labels=False, ids=["train_00007"])
    assert set(source[0]) == {"image", "id"}
    np.testing.assert_array_equal(source[0]["image"][..., 0], arrays("train")[0][7])
    with pytest.raises(UserError, match=r"no train-labels-idx1-ubyte\.gz in .*fashion-mnist"):
        loading.load(data, "train", labels=True)


def test_a_copy_in_another_process_reads_the_same(tmp_path):
    source = loading.load(write(tmp_path), "train+val", labels=True)
    assert len(source) == 29
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[28]["image"], source[28]["image"])


def swap(folder):
    (folder / "train-images-idx3-ubyte").replace(folder / "x")
    (folder / "train-labels-idx1-ubyte").replace(folder / "train-images-idx3-ubyte")
    (folder / "x").replace(folder / "train-labels-idx1-ubyte")


def cut(length):
    def spoil(folder):
        path = folder / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:length])

    return spoil


def lengthen(folder):
    with (folder / "train-images-idx3-ubyte").open("ab") as file:
        file.write(b"\n")


def count(folder):
    shutil.copy(folder / "t10k-labels-idx1-ubyte", folder / "train-labels-idx1-ubyte")


def foreign(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.full(23, 26, np.uint8)))


def pack(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(path.read_bytes()))


def tear(folder):
    path = folder / "train-images-idx3-ubyte"
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    path.unlink()


def scribble(folder):
    (folder / "train-images-idx3-ubyte").unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (swap, "images.*does not begin as an IDX file of bytes in 3 dimension"),
        (cut(0), "does not begin as an IDX file"),
        (cut(9), "does not begin as an IDX file"),
        (cut(-1), r"has 18047 bytes; 18048 are right for 23 x 28 x 28 values"),
        (lengthen, "has 18049 bytes; 18048 are right"),
        (count, r"train-labels.* holds 6 labels for 23 images"),
        (pack, "does not begin as an IDX file"),
        (tear, r"train-images-idx3-ubyte\.gz cannot be read"),
        (scribble, r"train-images-idx3-ubyte\.gz cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, spoil, words):
    data = write(tmp_path)
    spoil(tmp_path)
    with pytest.raises(
        UnreadableError, match=rf"{words}.*Download it again\.(| If it is packed, .*)$"
    ):
        loading.load(data, "train", labels=True)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    data = write(tmp_path)
    foreign(tmp_path)
    with pytest.raises(UserError, match=r"train-labels.* the label 26\. Known are 0 to 9"):
        loading.load(data, "train", labels=True)
