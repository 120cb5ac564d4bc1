import hashlib
import random

import pytest

from jaxssl.contracts import UserError
from jaxssl.data import splits

IDS = tuple(f"city_{i:06d}_000019" for i in range(2975))
DATA = {"split": "1_8", "seed": 1}


def sha(ids):
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "text",
    [
        "{0}\n{1}\n",
        "\ufeff{0}\n{1}\n",
        "leftImg8bit/train/city/{0}_leftImg8bit.png\nleftImg8bit/train/city/{1}_leftImg8bit.png",
        "train/city/{0}_leftImg8bit.png gtFine/train/city/{0}_gtFine_labelTrainIds.png\n"
        "train/city/{1}_leftImg8bit.png gtFine/train/city/{1}_gtFine_labelTrainIds.png\n",
        "/images/{1}_leftImg8bit.png\t/labels/{1}.png\r\n/images/{0}_leftImg8bit.png\t/{0}.png\r\n",
        "JPEGImages/{0}.jpg SegmentationClassAug/{0}.png\n\n{1}\n{0}\n",
    ],
)
def test_forms_of_list_files(tmp_path, text):
    path = tmp_path / "labeled.txt"
    path.write_text(text.format("city_000001_000019", "2007_000032"), encoding="utf-8", newline="")
    known = ["2007_000032", "city_000001_000019", "city"]
    assert splits.read_list(path, known) == ("2007_000032", "city_000001_000019")


@pytest.mark.parametrize(
    ("line", "image_id"),
    [
        ("in/c", "in/c"),
        ("in/c.png", "in/c"),
        ("data/images/in/c.PNG labels/in/d.png", "in/c"),
        ("a b", "a b"),
        ("images/a b.jpg", "a b"),
        ("x/a b.jpg, y/d m.png", "a b"),
        ("unlabeled/d.png", "unlabeled/d"),
        ("images/d.png", "d"),
        ("v1.2", "v1.2"),
        ("frames/v1.2.png", "v1.2"),
        ("a,d.png", "a"),
    ],
)
def test_a_line_of_a_list_names_the_longest_id_that_it_ends_with(tmp_path, line, image_id):
    path = tmp_path / "labeled.txt"
    path.write_text(line)
    assert splits.read_list(path, ["a", "a b", "d", "in/c", "c", "unlabeled/d", "v1.2", "v1"]) == (
        image_id,
    )


def test_unknown_images_of_a_list_are_shown_beside_known_ones(tmp_path):
    path = tmp_path / "labeled.txt"
    path.write_text("x/gone.png y/c.png\nin/c.png")
    with pytest.raises(UserError, match=r"labeled\.txt: 1 of 2 .* such as gone\. .* a, c, in/c\."):
        splits.read_list(path, ["in/c", "c", "a"])


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\x89PNG\xff"])
def test_useless_list_is_refused(tmp_path, content):
    path = tmp_path / "labeled.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"labeled\.txt"):
        splits.read_list(path, ["a"])
    with pytest.raises(UserError, match=r"absent\.txt"):
        splits.read_list(tmp_path / "absent.txt", ["a"])


def test_fingerprint():
    assert splits.fingerprint(["b", "a", "b"]) == "7e18f737311b2dc3"  # printf 'a\nb' | sha256sum


def test_recognize(monkeypatch):
    published = splits._published()
    assert len(published) == 98
    cps = "cps 1-16 labeled (DATA/city/config_new/subset_train/train_aug_labeled_1-16.txt)"
    unimatch = "unimatch 1_16 labeled (splits/cityscapes/1_16/labeled.txt)"
    assert published["1e5363dd012cdc46"] == f"{cps}; {unimatch}"
    monkeypatch.setattr(splits, "_published", lambda: {sha(IDS[:3]): "mine 3"})
    assert splits.recognize(IDS[:3]) == "mine 3"
    assert splits.recognize(IDS[:4]) is None


@pytest.mark.parametrize(
    ("split", "count"),
    [("1_16", 186), ("1_8", 372), ("1_4", 744), ("1_2", 1488), ("100", 100), ("all", 2975)],
)
def test_make_counts(split, count):
    labeled, unlabeled = splits.make(IDS, split, seed=0)
    assert len(labeled) == count
    assert set(labeled).isdisjoint(unlabeled)
    assert tuple(sorted(labeled + unlabeled)) == IDS
    assert list(labeled) == sorted(labeled)
    assert list(unlabeled) == sorted(unlabeled)


def test_make_is_nested_seeded_and_independent_of_order():
    by_hash = sorted(IDS, key=lambda i: hashlib.sha256(f"7/{i}".encode()).hexdigest())
    shuffled = random.Random(0).sample(IDS, len(IDS))
    for split, count in (("1_16", 186), ("1_8", 372), ("1_4", 744)):
        assert splits.make(shuffled, split, 7)[0] == tuple(sorted(by_hash[:count]))
    assert splits.make(IDS, "1_16", 7) != splits.make(IDS, "1_16", 8)


def test_overlap_only_if_asked():
    labeled, unlabeled = splits.make(IDS, "1_8", 0, overlap=True)
    assert len(labeled) == 372
    assert unlabeled == IDS


@pytest.mark.parametrize("split", ["1_0", "half", "0", "0_8", "2975", "3000", "1_9999", "-1"])
def test_impossible_split_is_refused(split):
    with pytest.raises(UserError, match=r"data\.split"):
        splits.make(IDS, split, 0)


def write(path, ids):
    path.write_text("\n".join(ids))
    return str(path)


def test_choose_reads_lists(tmp_path):
    labeled = write(tmp_path / "labeled.txt", IDS[5:9])
    split = splits.choose(DATA | {"labeled_list": labeled}, IDS)
    assert split.labeled == IDS[5:9]
    assert split.unlabeled == IDS[:5] + IDS[9:]
    assert split.family == f"list {labeled}"
    assert split.seed is None

    unlabeled = write(tmp_path / "unlabeled.txt", (*IDS[20:30], "extra_1"))
    both = DATA | {"labeled_list": labeled, "unlabeled_list": unlabeled}
    assert splits.choose(both, IDS, ["extra_1"]).unlabeled == (*IDS[20:30], "extra_1")


def test_choose_adds_extra_images_to_the_unlabeled():
    split = splits.choose(DATA, IDS, ["a_extra"])
    assert split.labeled == splits.make(IDS, "1_8", 1)[0]
    assert split.unlabeled == ("a_extra", *splits.make(IDS, "1_8", 1)[1])
    assert split.family == "jaxssl 1_8"
    assert splits.choose(DATA | {"split": "all"}, IDS, ["a_extra"]).unlabeled == ("a_extra",)


def test_choose_names_overlapping_and_unknown_ids(tmp_path):
    data = DATA | {
        "labeled_list": write(tmp_path / "labeled.txt", IDS[:4]),
        "unlabeled_list": write(tmp_path / "unlabeled.txt", IDS[3:8]),
    }
    with pytest.raises(UserError, match=f"1 images.*{IDS[3]}"):
        splits.choose(data, IDS)
    assert splits.choose(data | {"overlap": True}, IDS).unlabeled == IDS[3:8]
    with pytest.raises(UserError, match=rf"labeled\.txt: 2 of 4 .*{IDS[0]}"):
        splits.choose(data, IDS[2:])


def test_json_round_trip():
    split = splits.choose(DATA, IDS[:40])
    text = split.to_json()
    assert splits.Split.from_json(text) == split
    assert split.hash == {"labeled": sha(split.labeled), "unlabeled": sha(split.unlabeled)}
    for damaged in (text.replace(split.labeled[0], "other"), text[:50], "{}"):
        with pytest.raises(UserError, match=r"splits\.json"):
            splits.Split.from_json(damaged)


CLASSES = {image_id: (i * i) % 7 for i, image_id in enumerate(IDS)}


def per_class(ids, classes=CLASSES):
    return [sum(classes[i] == c for i in ids) for c in sorted(set(classes.values()))]


def test_classes_are_drawn_alike_and_nested():
    """Squares modulo 7 are 0, 1, 2 or 4, the latter three twice as often as 0."""
    before = ()
    for count in (4, 6, 40, 43, 400, "1_8"):
        labeled, unlabeled = splits.make(IDS, str(count), 3, classes=CLASSES)
        numbers = per_class(labeled)
        assert max(numbers) - min(numbers) <= 1
        assert sum(numbers) == (372 if count == "1_8" else count)
        assert set(labeled) | set(unlabeled) == set(IDS)
        if count == "1_8":
            before = splits.make(IDS, "40", 3, classes=CLASSES)[0]
        assert set(before) <= set(labeled)
        before = labeled
    shuffled = random.Random(1).sample(IDS, len(IDS))
    assert (
        splits.make(shuffled, "400", 3, classes=CLASSES)[0]
        == splits.make(IDS, "400", 3, classes=CLASSES)[0]
    )
    assert splits.make(IDS, "40", 4, classes=CLASSES) != splits.make(IDS, "40", 3, classes=CLASSES)


def test_of_a_class_the_first_by_hash_are_drawn():
    labeled, _ = splits.make(IDS, "40", 3, classes=CLASSES)
    for label in (0, 1, 2, 4):
        mine = [i for i in IDS if CLASSES[i] == label]
        first = sorted(mine, key=lambda i: hashlib.sha256(f"3/{i}".encode()).digest())[:10]
        assert {i for i in labeled if CLASSES[i] == label} == set(first)


def test_a_class_with_few_images_gives_what_it_has():
    classes = {f"{i:03d}": min(i, 3) for i in range(103)}  # one of 0, 1 and 2 each, 100 of 3
    labeled, _ = splits.make(classes, "20", 0, classes=classes)
    assert per_class(labeled, classes) == [1, 1, 1, 17]


def test_an_image_without_a_class_is_never_drawn():
    classes = {image_id: CLASSES[image_id] for image_id in IDS[::2]}
    labeled, unlabeled = splits.make(IDS, "all", 0, classes=classes)
    assert labeled == IDS[::2]
    assert unlabeled == IDS[1::2]
    with pytest.raises(UserError, match=r"asks for 1489 labeled images; there are 1488"):
        splits.make(IDS, "1489", 0, classes=classes)


@pytest.mark.parametrize("classes", [None, CLASSES])
def test_what_is_held_out_is_neither_labeled_nor_unlabeled(classes):
    without = splits.choose(DATA, IDS, ["extra"], classes)
    split = splits.choose(DATA | {"validation": 80}, IDS, ["extra"], classes)
    assert len(split.holdout) == 80
    assert split.labeled == without.labeled
    assert set(split.unlabeled) == set(without.unlabeled) - set(split.holdout)
    assert without.holdout == ()
    more = splits.choose(DATA | {"validation": 120, "split": "1_2"}, IDS, (), classes)
    assert set(split.holdout) <= set(more.holdout)
    if classes:
        assert per_class(split.holdout) == [20] * 4
    everything = splits.choose(DATA | {"validation": 80, "split": "all"}, IDS, (), classes)
    assert set(everything.labeled) == set(IDS) - set(everything.holdout)
    overlapping = splits.choose(DATA | {"validation": 80, "overlap": True}, IDS, (), classes)
    assert set(overlapping.unlabeled) == set(IDS) - set(split.holdout)


def test_lists_and_what_is_held_out(tmp_path):
    data = DATA | {"labeled_list": write(tmp_path / "l.txt", IDS[:40]), "validation": 80}
    split = splits.choose(data, IDS, (), CLASSES)
    assert split.labeled == IDS[:40]
    assert set(split.holdout).isdisjoint(IDS[:40])
    named = data | {"unlabeled_list": write(tmp_path / "u.txt", split.holdout[:9] + IDS[40:50])}
    others = splits.choose(named, IDS, (), CLASSES)
    assert others.holdout == split.holdout
    assert set(others.unlabeled) == set(IDS[40:50]) - set(split.holdout)


@pytest.mark.parametrize("count", [-1, 2975, 5000])
def test_too_much_to_hold_out_is_refused(count):
    with pytest.raises(UserError, match=rf"data\.validation={count} cannot be held out of 2975"):
        splits.choose(DATA | {"validation": count}, IDS)


def test_no_class_is_held_out_whole():
    classes = CLASSES | dict.fromkeys(IDS[:5], 6)
    splits.choose(DATA | {"validation": 20}, IDS, (), classes)
    with pytest.raises(UserError, match=r"takes all images of 1 class\(es\), such as number 6"):
        splits.choose(DATA | {"validation": 25}, IDS, (), classes)


def test_json_of_a_split_with_a_holdout():
    split = splits.choose(DATA | {"validation": 4}, IDS[:80], (), CLASSES)
    assert splits.Split.from_json(split.to_json()) == split
    assert split.hash["holdout"] == sha(split.holdout)
    assert "by class" in split.family
    assert "holdout" not in splits.choose(DATA, IDS[:80]).to_json()
    with pytest.raises(UserError, match=r"splits\.json"):
        splits.Split.from_json(split.to_json().replace(split.holdout[0], "other"))
