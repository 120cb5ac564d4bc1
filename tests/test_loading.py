"""What training reads where labels are classes of whole images."""

import dataclasses

import numpy as np
import pytest

from jaxssl.contracts import DataInfo, Record, UnreadableError
from jaxssl.data import digits, loading

DIGITS = {"name": "digits", "root": "", "split": "50", "seed": 0, "size": 8}


def test_digits_are_split_by_class():
    split, sources = loading.training_sets(DIGITS | {"validation": 30})
    assert {name: len(source) for name, source in sources.items()} == {
        "labeled": 50,
        "unlabeled": 1437 - 50 - 30,
        "holdout": 30,
    }
    assert np.bincount(sources["labeled"].class_ids).tolist() == [5] * 10
    assert np.bincount(sources["holdout"].class_ids).tolist() == [3] * 10
    assert "label" not in sources["unlabeled"][0]
    sets = [set(source.ids) for source in sources.values()]
    train = loading.load(DIGITS, "train", labels=False).ids
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(train)
    assert split.family == "jaxssl 50 by class"
    truth = loading.truth(DIGITS, split)
    assert truth.ids == split.unlabeled
    assert truth[7]["label"] == truth.class_ids[7]
    assert "holdout" not in loading.training_sets(DIGITS)[1]


def test_labels_are_left_alone_where_a_list_names_the_images(tmp_path, monkeypatch):
    train = loading.load(DIGITS, "train", labels=False).ids
    (tmp_path / "list.txt").write_text("\n".join(train[:30]))
    opened, load = [], digits.load

    def watching(config_data, split, labels, ids=None):
        if labels:
            opened.append(ids)
        return load(config_data, split, labels, ids)

    monkeypatch.setattr(digits, "load", watching)
    split, _ = loading.training_sets(DIGITS | {"labeled_list": str(tmp_path / "list.txt")})
    assert split.labeled == train[:30]
    assert opened == [train[:30]]


@dataclasses.dataclass(frozen=True)
class Plain:
    """A source that knows no classes without its records."""

    info = DataInfo(("a", "b"), ((0, 0, 0), (1, 1, 1)), "classification")
    ids = ("0", "1", "2", "3")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise UnreadableError("2 is damaged.")
        record = Record(image=np.zeros((2, 2, 3), np.uint8), id=self.ids[index])
        return record if index == 3 else record | {"label": np.uint8(index)}


def test_classes_of_a_plain_source_are_read_from_its_records():
    found = loading.class_ids(Plain())
    assert found.dtype == np.uint8
    assert found.tolist() == [0, 1, 255, 255]


@pytest.mark.parametrize("name", ["digits", "cifar10", "mnist"])
def test_readers_are_found_by_name(name):
    assert loading._reader(name) is not None
