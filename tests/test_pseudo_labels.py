import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxssl import selection
from jaxssl.contracts import DataInfo, Selection, UnreadableError, UserError
from jaxssl.data import pseudo_labels
from jaxssl.data.files import whole
from jaxssl.data.pipeline import Feed, Stream, batches
from jaxssl.data.pseudo_labels import ClassStore, PseudoLabeled, Store
from jaxssl.data.transforms import Augment

INFO = DataInfo(("sky", "sea"), ((10, 20, 250), (0, 90, 80)))


class Images:
    """Black images of one size."""

    info, ids = INFO, ("city/one", "two")

    def __init__(self, size=(4, 6)):
        self.size = size

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"image": np.zeros((*self.size, 3), np.uint8), "id": self.ids[index]}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "round_1", INFO)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((4, 6)) < 0.3, 255, rng.integers(0, 2, (4, 6))).astype(np.uint8)
    levels = rng.integers(0, 2**16, (4, 6)).astype(np.uint16)
    levels[0, :2] = 0, 2**16 - 1
    return labels, levels


def test_labels_come_back_and_can_be_looked_at(store, arrays):
    labels, levels = arrays
    assert store.missing(Images.ids) == list(Images.ids)
    store.write("city/one", labels, levels)
    assert store.missing(Images.ids) == ["two"]
    for mine, theirs in zip(store.read("city/one"), arrays, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    picture = Image.open(store.folder / "labels" / "city" / "one.png")
    assert picture.mode == "P"
    colors = np.asarray(picture.convert("RGB"))
    for label, color in ((0, (10, 20, 250)), (1, (0, 90, 80)), (255, (255, 255, 255))):
        assert (colors[labels == label] == color).all()
    confidence = Image.open(store.folder / "confidence" / "city" / "one.png")
    assert confidence.getextrema() == (0, 2**16 - 1)


def test_a_label_is_replaced_at_once(store, arrays):
    labels, levels = arrays
    store.write("two", labels, levels)
    store.write_labels("two", np.full_like(labels, 255))
    assert (store.read("two")[0] == 255).all()
    np.testing.assert_array_equal(store.read("two")[1], levels)
    files = [path for path in store.folder.rglob("*") if path.is_file()]
    assert len(files) == 2


def test_what_was_not_written_to_its_end_is_missing(store, arrays, monkeypatch):
    def save(self, file, *args, **kwargs):
        file.write(b"half")
        if self.mode == "P":
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        store.write("two", *arrays)
    assert store.missing(["two"]) == ["two"]
    assert not list(store.folder.rglob("*.part"))


def test_selection_and_summary_come_back(store):
    assert store.read_selection() is None
    chosen = Selection(np.array([7, selection.LEVELS]), np.array([0.1, 1.0]))
    store.write_selection(chosen, np.array([5 * 10**10, 0]), np.array([3, 4]))
    found, predicted, prior = store.read_selection()
    np.testing.assert_array_equal(found.lowest, chosen.lowest)
    np.testing.assert_array_equal(found.share, chosen.share)
    assert predicted.tolist() == [5 * 10**10, 0]
    assert prior.tolist() == [3, 4]
    assert not store.complete
    store.write_summary({"kept": 0.5})
    assert store.complete
    assert store.read_summary() == {"kept": 0.5}


def test_records_have_label_and_confidence(store, arrays):
    labels, levels = arrays
    store.write("two", labels, levels)
    source = PseudoLabeled(Images(), store)
    assert source.ids == Images.ids
    assert len(source) == 2
    record = source[1]
    assert record["id"] == "two"
    np.testing.assert_array_equal(record["label"], labels)
    assert record["confidence"].dtype == np.float32
    expected = 1 - 2.0 ** (-levels.astype(np.float64) / 2048)
    np.testing.assert_allclose(record["confidence"], expected, atol=1e-7)
    (store.folder / "confidence" / "two.png").unlink()
    alone = PseudoLabeled(Images(), store, confidence=False)[1]
    np.testing.assert_array_equal(alone["label"], labels)
    assert "confidence" not in alone


def test_what_is_wrong_is_told(store, arrays):
    source = PseudoLabeled(Images(), store)
    with pytest.raises(UnreadableError, match=r"two\.png"):
        source[1]
    store.write("two", *arrays)
    with pytest.raises(UserError, match="changed its size") as caught:
        PseudoLabeled(Images((4, 7)), store)[1]
    assert not isinstance(caught.value, UnreadableError)
    path = store.folder / "confidence" / "two.png"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableError, match=r"confidence/two\.png"):
        store.read("two")
    Image.new("L", (6, 4)).save(path)
    with pytest.raises(UnreadableError, match=r"two\.png is not as it was written: it has mode L"):
        store.read("two")
    (store.folder / "selection.json").write_text("{")
    with pytest.raises(UserError, match=r"selection\.json cannot be read"):
        store.read_selection()


def test_a_file_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"), whole(tmp_path / "file" / "x.png"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


WHOLE = DataInfo(("cat", "dog"), ((1, 1, 1), (2, 2, 2)), "classification")


class Pictures(Images):
    """Images with a class each."""

    info = WHOLE


@pytest.fixture
def classes(tmp_path):
    return Store.of(tmp_path, "round_1", WHOLE)


def again(store):
    """The store as another process has it."""
    return pickle.loads(pickle.dumps(store))


def files(store):
    return sorted(path.name for path in store.folder.iterdir()) if store.folder.exists() else []


def rows(store, ids):
    return {i: tuple(int(x) for x in store.read(i)) for i in ids}


def test_the_task_decides_the_form(tmp_path, classes):
    assert type(Store.of(tmp_path, "round_1", INFO)) is Store
    assert isinstance(classes, ClassStore)
    assert classes.folder == tmp_path / "pseudo_labels" / "round_1"


def test_classes_of_images_are_one_file_in_the_end(classes):
    expected = {f"train/{i}": (i % 2, 7 * i) for i in range(2000)} | {"ä b": (255, 65535)}
    for image_id, (label, level) in expected.items():
        classes.write(image_id, np.uint8(label), np.uint16(level))
    assert rows(classes, expected) == expected
    assert files(classes) == []
    assert again(classes).missing(["train/3"]) == ["train/3"]
    classes.flush()
    assert len(files(classes)) == 1
    assert again(classes).missing([*expected, "other"]) == ["other"]
    label, level = again(classes).read("train/9")
    assert (label.dtype, level.dtype, label.shape) == (np.uint8, np.uint16, ())
    classes.write_labels("train/9", np.uint8(255))
    classes.flush()
    assert rows(again(classes), expected) == expected | {"train/9": (255, 63)}
    classes.write_summary({"kept": 0.5})
    assert files(classes) == ["labels.npz", "summary.json"]
    assert again(classes).complete
    assert rows(again(classes), expected) == expected | {"train/9": (255, 63)}
    with np.load(classes.folder / "labels.npz", allow_pickle=False) as stored:
        assert list(stored["ids"]) == sorted(expected)
        assert stored["labels"].dtype == np.uint8
        assert stored["levels"].dtype == np.uint16


def test_many_labels_reach_the_disk_as_they_come(classes, monkeypatch):
    monkeypatch.setattr(pseudo_labels, "PIECE", 10)
    with ThreadPoolExecutor(4) as pool:
        for i in range(64):
            pool.submit(classes.write, f"{i}", np.uint8(1), np.uint16(i))
    assert len(again(classes).missing([f"{i}" for i in range(64)])) == 4
    assert len(files(classes)) == 6


def test_processes_write_pieces_of_their_own(classes):
    """Two label and drop each their half; then one of them completes the folder."""
    ids = [f"{i}" for i in range(10)]
    others = again(classes)
    for i, image_id in enumerate(ids):
        (classes, others)[i % 2].write(image_id, np.uint8(0), np.uint16(i))
    for store in (classes, others):
        store.flush()
    one, other = again(classes), again(classes)  # killed, and started anew
    assert one.missing(ids) == []
    for store, image_id in ((one, "3"), (other, "8")):
        store.write_labels(image_id, np.uint8(255))
        store.flush()
    assert rows(again(one), ids)["8"] == (255, 8)
    one.write_summary({})
    assert files(one) == ["labels.npz", "summary.json"]
    assert [i for i, (label, _) in rows(again(one), ids).items() if label == 255] == ["3", "8"]


def test_a_piece_that_was_not_written_to_its_end_is_missing(classes, monkeypatch):
    def save(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    classes.write("two", np.uint8(0), np.uint16(1))
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", save)
        with pytest.raises(KeyboardInterrupt):
            classes.flush()
    assert files(classes) == []
    assert again(classes).missing(["two"]) == ["two"]
    classes.flush()
    assert again(classes).missing(["two"]) == []


def test_records_of_whole_images(classes):
    classes.write("two", np.uint8(1), np.uint16(2048))
    classes.write_summary({})
    source = pickle.loads(pickle.dumps(PseudoLabeled(Pictures(), classes)))
    record = source[1]
    assert (record["label"].shape, record["label"].dtype, record["label"]) == ((), np.uint8, 1)
    assert record["confidence"].dtype == np.float32
    assert record["confidence"] == 0.5
    assert "confidence" not in PseudoLabeled(Pictures(), classes, confidence=False)[1]
    with pytest.raises(UnreadableError, match=r"labels\.npz .* no label of city/one\. .*delete"):
        source[0]
    content = (classes.folder / "labels.npz").read_bytes()
    altered = content[:90] + bytes(len(content) - 400) + content[-310:]
    renamed = content.replace(b"levels", b"lavels")
    for damaged in (content[:100], b"", b"PK", altered, renamed):
        (classes.folder / "labels.npz").write_bytes(damaged)
        with pytest.raises(UnreadableError, match=r"labels\.npz is not as it was written"):
            again(classes).read("two")


def test_images_whose_label_is_not_kept_are_dropped(classes, store, arrays):
    assert classes.dropped(Pictures.ids) == {"city/one", "two"}
    classes.write("city/one", np.uint8(1), np.uint16(2048))
    classes.write("two", np.uint8(0), np.uint16(0))
    classes.write_labels("two", np.uint8(255))
    assert classes.dropped(Pictures.ids) == {"two"}
    labels, levels = arrays
    store.write("two", np.full_like(labels, 255), levels)  # of the pixels of an image, some
    assert store.dropped(["two"]) == set()


def test_batches_of_pseudo_labeled_images(classes):
    for image_id, label, level in (("city/one", 1, 2048), ("two", 255, 0)):
        classes.write(image_id, np.uint8(label), np.uint16(level))
    classes.write_summary({})
    feed = Feed(Stream("unlabeled", 2), PseudoLabeled(Pictures(), classes), Augment((4, 6)))
    with batches([feed], seed=0, phase_index=0, start=0, steps=1) as iterator:
        batch = next(iterator)["unlabeled"]
    order = np.argsort(batch["index"])
    assert batch["label"][order].tolist() == [1, 255]
    assert batch["confidence"][order].tolist() == [0.5, 0.0]
    assert (batch["label"].dtype, batch["confidence"].dtype) == (np.uint8, np.float32)
    assert set(batch) == {"image", "label", "confidence", "index"}
