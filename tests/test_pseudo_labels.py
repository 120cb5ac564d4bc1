import numpy as np
import pytest
from PIL import Image

from jaxssl import selection
from jaxssl.contracts import DataInfo, Selection, UnreadableError, UserError
from jaxssl.data.files import whole
from jaxssl.data.pseudo_labels import PseudoLabeled, Store

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
