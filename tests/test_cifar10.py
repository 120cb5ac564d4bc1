import os
import pickle
import struct
import tarfile

import numpy as np
import pytest

from jaxssl.contracts import UnreadableError, UserError
from jaxssl.data import cifar10, loading

NAMES = ("airplane", "automobile", "bird", "cat", "deer")
NAMES = (*NAMES, "dog", "frog", "horse", "ship", "truck")
FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
ROWS = dict(zip(FILES, (7, 7, 7, 7, 5, 9), strict=True))


class Python2:
    """Pickles as Python 2's cPickle does by protocol 2: texts are bytes, and all is memorized."""

    def __init__(self, value):
        self.parts, self.memo = [b"\x80\x02"], 0
        self.write(value)
        self.bytes = b"".join([*self.parts, b"."])

    def put(self, *parts):
        self.memo += 1
        kind = b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<I", self.memo)
        self.parts += [*parts, kind]

    def write(self, value):
        match value:
            case str():
                short = b"U" + bytes([min(len(value), 255)]) + value.encode()
                long = b"T" + struct.pack("<I", len(value)) + value.encode()
                self.put(short if len(value) < 256 else long)
            case int():
                sizes = ((256, b"K", "<B"), (65536, b"M", "<H"), (2**31, b"J", "<i"))
                kind, form = next((k, f) for most, k, f in sizes if value < most)
                self.parts.append(kind + struct.pack(form, value))
            case list() | dict():
                self.put(b"]" if isinstance(value, list) else b"}")
                items = sum(value.items(), ()) if isinstance(value, dict) else value
                self.parts.append(b"(")
                for item in items:
                    self.write(item)
                self.parts.append(b"e" if isinstance(value, list) else b"u")
            case np.ndarray():
                self.array(value)

    def array(self, value):
        self.put(b"cnumpy.core.multiarray\n_reconstruct\n")
        self.put(b"cnumpy\nndarray\n")
        self.parts.append(b"K\x00\x85U\x01b\x87R(K\x01")
        for length in value.shape:
            self.write(length)
        self.put(b"\x86cnumpy\ndtype\n")
        self.parts.append(
            b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        )
        self.parts.append(
            b"K\x00tb\x89T" + struct.pack("<I", value.nbytes) + value.tobytes() + b"tb"
        )


def batch(name, rows):
    rng = np.random.default_rng(FILES.index(name))
    return {
        "batch_label": name.replace("_", " "),
        "labels": rng.integers(0, 10, rows).tolist(),
        "data": rng.integers(0, 256, (rows, 3072), np.uint8),
        "filenames": [f"{name}_s_{i:06d}.png" for i in range(rows)],
    }


META = {"num_cases_per_batch": 10000, "label_names": list(NAMES), "num_vis": 3072}


def write(folder, rows=ROWS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "batches.meta").write_bytes(Python2(META).bytes)
    for name in FILES:
        (folder / name).write_bytes(Python2(batch(name, rows[name])).bytes)
    return folder


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "cifar-10-batches-py")
    return tmp_path


def config(root, **changes):
    return {"name": "cifar10", "root": str(root), "split": "10", "seed": 0, **changes}


def test_files_of_the_test_are_as_python_2_wrote_them(root):
    """Python's own reader takes them, and batches.meta has the size of the published file."""
    folder = root / "cifar-10-batches-py"
    assert (folder / "batches.meta").stat().st_size == 158
    found = pickle.loads((folder / "data_batch_2").read_bytes(), encoding="latin-1")
    expected = batch("data_batch_2", 7)
    np.testing.assert_array_equal(found.pop("data"), expected.pop("data"))
    assert found == expected


@pytest.mark.parametrize("inside", [True, False])
def test_reads_images_and_labels(root, inside):
    source = loading.load(config(root / "cifar-10-batches-py" if inside else root), "train", True)
    assert source.info.classes == NAMES
    assert source.info.task == "classification"
    assert source.ids == tuple(f"train_{i:05d}" for i in range(33))
    rows = [batch(name, ROWS[name]) for name in FILES[:5]]
    pixels, labels = (np.concatenate([row[key] for row in rows]) for key in ("data", "labels"))
    for i in range(33):
        record = source[i]
        for channel in range(3):  # a row is the red, then the green, then the blue plane
            plane = pixels[i, 1024 * channel : 1024 * (channel + 1)].reshape(32, 32)
            np.testing.assert_array_equal(record["image"][..., channel], plane)
        assert record["image"].dtype == record["label"].dtype == np.uint8
        assert record["label"].shape == ()
        assert record["label"] == labels[i]
        assert record["id"] == source.ids[i]
    np.testing.assert_array_equal(source.class_ids, labels)


def test_the_test_set_is_val(root):
    source = loading.load(config(root), "val", True)
    assert source.ids == tuple(f"test_{i:05d}" for i in range(9))
    assert [int(source[i]["label"]) for i in range(9)] == batch("test_batch", 9)["labels"]
    some = loading.load(config(root), "train+val", False, ["test_00003", "train_00008"])
    assert some.ids == ("test_00003", "train_00008")
    assert set(some[0]) == {"image", "id"}
    assert some.class_ids is None
    np.testing.assert_array_equal(some[0]["image"], source[3]["image"])


def test_a_copy_in_another_process_reads_the_same(root):
    source = loading.load(config(root), "train", True)
    content = pickle.dumps(source)
    assert len(content) < 3000
    np.testing.assert_array_equal(pickle.loads(content)[4]["image"], source[4]["image"])


def test_a_changed_file_is_read_again(root):
    before = loading.load(config(root), "val", True)[0]["label"]
    changed = batch("test_batch", 9) | {"labels": [(int(before) + 1) % 10] * 9}
    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(Python2(changed).bytes)
    os.utime(path, ns=(1, 1))
    assert loading.load(config(root), "val", True)[0]["label"] != before


class Call:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_nothing_in_a_file_is_run(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = root / "cifar-10-batches-py" / "data_batch_3"
    good = path.read_bytes()
    call = pickle.dumps(Call(), 2)[2:-1]
    for attack in (
        pickle.dumps(Call(), 2),
        pickle.dumps({"data": Call()}, 0),
        good.replace(b"cnumpy.core.multiarray\n_reconstruct\n", b"cos\nsystem\n"),
        good.replace(b"cnumpy\nndarray\n", call),
    ):
        path.write_bytes(attack)
        with pytest.raises(UserError, match=r"data_batch_3 .*It was not run"):
            loading.load(config(root), "train", True)
    assert not (tmp_path / "ran").exists()


def test_every_truncation_is_an_error(root):
    path = root / "cifar-10-batches-py" / "test_batch"
    content = path.read_bytes()
    for length in (*range(0, 600, 7), *range(600, len(content), 997), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableError, match=r"test_batch is damaged.*cifar-10-python\.tar"):
            loading.load(config(root), "val", True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": np.zeros((3, 3071), np.uint8), "labels": [0, 1, 2]}, "no rows of 32x32"),
        ({"data": [1, 2], "labels": [0, 1]}, "no rows of 32x32"),
        ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1]}, "does not hold 3 labels"),
        ({"data": np.zeros((3, 3072), np.uint8), "fine_labels": [0, 1, 2]}, "not hold 3 labels"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, "the label 10"),
        ([1, 2], "holds no dict"),
    ],
)
def test_files_of_another_kind_are_named(root, content, words):
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(Python2(content).bytes)
    with pytest.raises(UserError, match=rf"test_batch .*{words}.*cifar-10-python\.tar\.gz"):
        loading.load(config(root), "val", True)


def test_missing_data_say_what_to_do(root, tmp_path):
    folder = root / "cifar-10-batches-py"
    (folder / "data_batch_4").unlink()
    with pytest.raises(UnreadableError, match=r"data_batch_4 cannot be read: No such file.*Unpack"):
        loading.load(config(root), "train", True)
    with pytest.raises(UserError, match=r"is missing.*cifar\.html.*tar -xzf.*data\.root=DIR"):
        loading.load(config(tmp_path / "none"), "train", True)
    with pytest.raises(UserError, match=r"has no split 'test'\. Choose one of: train, val"):
        loading.load(config(root), "test", True)
    with pytest.raises(UserError, match=r"no split 'train_extra'.*data\.extra=False"):
        loading.load(config(root), "train+train_extra", True)


def test_a_packed_archive_says_how_to_unpack_it(root, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    archive = packed / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    for place in (packed, archive):
        with pytest.raises(UserError, match=f"tar -xzf {archive} -C {packed}, and set"):
            loading.load(config(place), "train", True)


def test_files_of_the_published_length(tmp_path):
    """Ten thousand rows a file, as published: the row in front of a file's end is where it was."""
    folder = write(tmp_path / "c", ROWS | {"test_batch": 10000})
    source = loading.load(config(folder), "val", True)
    expected = batch("test_batch", 10000)
    assert len(source) == 10000
    assert source.ids[-1] == "test_09999"
    np.testing.assert_array_equal(source.class_ids, expected["labels"])
    last = expected["data"][-1].reshape(3, 32, 32)
    np.testing.assert_array_equal(np.moveaxis(source[9999]["image"], -1, 0), last)
    assert cifar10.FILES["val"] == ("test_batch",)
