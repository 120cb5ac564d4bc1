import collections
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxssl.contracts import DataInfo, Record, Stream, UserError
from jaxssl.data import quarantine
from jaxssl.data.files import open_image
from jaxssl.data.pipeline import Feed, batches, check_all, filled, in_order
from jaxssl.data.transforms import Augment

SHARED_MEMORY = Path("/dev/shm")
AUGMENT = Augment((9, 11), (0.7, 1.6))


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Image i is of color i, label i and sizes[i]."""

    sizes: tuple[tuple[int, int], ...]
    broken: int = -1
    info = DataInfo(("thing",), ((0, 0, 0),))

    @property
    def ids(self):
        return tuple(f"{i:03d}" for i in range(len(self.sizes)))

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        if index == self.broken:
            raise UserError(f"The file {index}.png cannot be read.")
        image = np.full((*self.sizes[index], 3), index, np.uint8)
        # A mark that shows the crop and the flip.
        image[:, :, 1] = np.arange(image.shape[1])
        return Record(image=image, label=image[..., 0], id=self.ids[index])


LABELED = Feed(Stream("labeled", 4), Numbered(((12, 16),) * 10), AUGMENT)
UNLABELED = Feed(Stream("unlabeled", 6, labels=None), Numbered(((10, 14),) * 13), AUGMENT)


def run(feeds=(LABELED, UNLABELED), start=0, steps=6, **options):
    options = {"seed": 3, "phase_index": 0} | options
    with batches(feeds, start=start, steps=steps, **options) as iterator:
        return list(iterator)


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_equal(one, other)


@pytest.fixture(scope="module")
def expected():
    """The first six batches of one process."""
    return run()


def test_batches_hold_what_the_contract_says(expected):
    for batch in expected:
        assert list(batch) == ["labeled", "unlabeled"]
        assert set(batch["labeled"]) == {"image", "label", "valid", "index"}
        assert set(batch["unlabeled"]) == {"image", "valid", "index"}
        for arrays, rows in ((batch["labeled"], 4), (batch["unlabeled"], 6)):
            assert arrays["image"].shape == (rows, 9, 11, 3)
            assert arrays["valid"].shape == (rows, 9, 11)
            assert arrays["image"].dtype == np.uint8
            assert arrays["valid"].dtype == bool
            assert arrays["index"].dtype == np.int32
            # The color of the image tells its position.
            expected_color = np.where(arrays["valid"], arrays["index"][:, None, None], 0)
            np.testing.assert_array_equal(arrays["image"][..., 0], expected_color)
        label = batch["labeled"]["index"][:, None, None]
        label = np.where(batch["labeled"]["valid"], label, 255)
        np.testing.assert_array_equal(batch["labeled"]["label"], label)


def test_every_epoch_takes_each_image_once():
    indices = [int(i) for batch in run(steps=30) for i in batch["labeled"]["index"]]
    epochs = [tuple(indices[i : i + 10]) for i in range(0, 120, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 12


@pytest.mark.parametrize("start", [1, 4])
def test_batch_is_a_function_of_the_step(expected, start):
    assert_equal(run(start=start), expected[start:])
    assert run(start=6) == []
    far = 10**7
    assert len(run(start=far, steps=far + 1)) == 1


@pytest.mark.parametrize("start", [0, 3])
def test_processes_take_contiguous_blocks(expected, start):
    halves = [run(start=start, process_index=i, process_count=2) for i in range(2)]
    joined = [
        {s: {n: np.concatenate([a[s][n], b[s][n]]) for n in a[s]} for s in a}
        for a, b in zip(*halves, strict=True)
    ]
    assert_equal(joined, expected[start:])


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_threads_change_nothing(expected, threads):
    assert_equal(run(threads=threads), expected)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"phase_index": 1}])
def test_seeds_and_phases_differ(expected, changed):
    other = run(**changed)
    for stream in ("labeled", "unlabeled"):
        orders = [[tuple(b[stream]["index"]) for b in series] for series in (expected, other)]
        assert orders[0] != orders[1]


def test_streams_of_the_same_images_are_shuffled_apart():
    feeds = [dataclasses.replace(LABELED, stream=Stream(name, 5)) for name in ("a", "b")]
    orders = [[tuple(batch[name]["index"]) for batch in run(feeds)] for name in ("a", "b")]
    assert orders[0] != orders[1]


def test_parts_divide_the_images():
    seen = []
    for part in ((0.0, 0.5), (0.5, 1.0)):
        feed = dataclasses.replace(LABELED, stream=Stream("labeled", 5, part=part))
        seen.append({int(i) for batch in run([feed]) for i in batch["labeled"]["index"]})
    assert [len(part) for part in seen] == [5, 5]
    assert seen[0] | seen[1] == set(range(10))
    feed = dataclasses.replace(LABELED, stream=Stream("labeled", 5, part=(0.5, 1.0)))
    later = {int(i) for batch in run([feed], phase_index=4) for i in batch["labeled"]["index"]}
    assert later == seen[1]


def test_images_that_are_not_used_never_come():
    source = LABELED.source
    feed = dataclasses.replace(LABELED, stream=Stream("labeled", 4), without=set(source.ids[2:6]))
    counts = collections.Counter(
        int(i) for b in run([feed], steps=6) for i in b["labeled"]["index"]
    )
    assert counts == dict.fromkeys((0, 1, 6, 7, 8, 9), 4)
    feed = dataclasses.replace(feed, without=source.ids[:7])
    with pytest.raises(UserError, match="takes 4 images, but there are only 3"):
        run([feed])


def test_stream_changes_the_augmentation():
    stream = Stream("labeled", 4, augment={"crop": (5, 7)})
    (batch,) = run([dataclasses.replace(LABELED, stream=stream)], steps=1)
    assert batch["labeled"]["image"].shape == (4, 5, 7, 3)


@pytest.mark.parametrize(
    ("batch", "processes", "message"),
    [(11, 1, r"takes 11 images.*10.*--config\.batch\.labeled"), (5, 2, "multiple of 2")],
)
def test_impossible_batches_are_refused(batch, processes, message):
    feed = dataclasses.replace(LABELED, stream=Stream("labeled", batch))
    with pytest.raises(UserError, match=message):
        run([feed], process_count=processes)


def children():
    return [process.pid for process in multiprocessing.active_children()]


def test_workers_change_nothing_and_leave_nothing(expected):
    """A resumed run with workers gives the same arrays, and closing early ends everything."""
    with batches(
        (LABELED, UNLABELED), seed=3, phase_index=0, start=2, steps=10**6, workers=2
    ) as iterator:
        assert_equal(list(itertools.islice(iterator, 4)), expected[2:])
        assert len(children()) == 2
    assert not children()
    assert next(iterator, None) is None
    iterator.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_source_arrive(workers):
    feed = dataclasses.replace(LABELED, source=Numbered(((12, 16),) * 10, broken=4))
    with pytest.raises(UserError) as error:
        run([feed], workers=workers)
    assert str(error.value) == "The file 4.png cannot be read."
    assert not children()


def test_death_of_a_worker_is_one_message():
    with batches([LABELED], seed=0, phase_index=0, start=0, steps=10**6, workers=1) as iterator:
        next(iterator)
        (pid,) = children()
        assert pid is not None
        time.sleep(0.5)  # Killed while it creates shared memory, it would leave a file behind.
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UserError, match="worker process died with exit code -9, often"):
            list(itertools.islice(iterator, 20))


TRAINER = """
    from tests_pipeline import LABELED, batches, children, dataclasses

    if __name__ == "__main__":
        feed = dataclasses.replace(LABELED, augment=LABELED.augment.__class__({crop}))
        with batches([feed], seed=0, phase_index=0, start=0, steps={steps}, workers=2) as iterator:
            for k, batch in enumerate(iterator):
                if k == 3:
                    print(*children(), flush=True)
        print("closed", flush=True)
"""


def trainer(folder, crop, steps):
    """A Python that iterates with two workers, without pytest and without absl's flags."""
    script = folder / "trainer.py"
    script.write_text(textwrap.dedent(TRAINER).format(crop=crop, steps=steps))
    (folder / "tests_pipeline.py").write_text(Path(__file__).read_text())
    return subprocess.Popen(
        [sys.executable, "-W", "error", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
    )


def is_alive(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


def shared_files(size):
    """Files in shared memory of exactly this size, which tells them from other programs'."""
    sizes = {}
    for path in SHARED_MEMORY.iterdir():
        with contextlib.suppress(FileNotFoundError):
            sizes[path] = path.stat().st_size
    return {path for path, found in sizes.items() if found == size}


def test_finished_run_writes_nothing_to_stderr(tmp_path):
    process = trainer(tmp_path, crop=(9, 11), steps=8)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.endswith("closed\n")
    assert errors == ""


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="needs Linux")
def test_killed_run_leaves_nothing_behind(tmp_path):
    crop, size = (37, 53), 4 * 37 * 53 * 3
    process = trainer(tmp_path, crop, steps=10**6)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    assert all(is_alive(pid) for pid in workers)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and (any(map(is_alive, workers)) or shared_files(size)):
        time.sleep(0.1)
    assert not any(map(is_alive, workers))
    assert not shared_files(size)


def rows(batch):
    """Indices of a batch's images, after a check of what belongs to each."""
    for index, image, valid, label in zip(
        batch["index"], batch["image"], batch["valid"], batch["label"], strict=True
    ):
        assert (valid == (index >= 0)).all()
        assert (label == (index if index >= 0 else 255)).all()
        assert (image[..., 0] == max(index, 0)).all()
    return batch["index"].tolist()


def test_in_order_gives_each_image_once():
    source = Numbered(((6, 8),) * 5)
    got = list(in_order(source, 2))
    assert [rows(batch) for batch in got] == [[0, 1], [2, 3], [4, -1]]
    assert {batch["image"].shape for batch in got} == {(2, 6, 8, 3)}
    assert list(in_order(Numbered(()), 2)) == []


@pytest.mark.parametrize(
    ("bucket", "expected"),
    [
        (1, {(6, 8): [[0, 3], [6, -1]], (8, 6): [[1, -1]], (5, 8): [[2, 5]], (8, 7): [[4, -1]]}),
        (2, {(6, 8): [[0, 2], [3, 5], [6, -1]], (8, 6): [[1, -1]], (8, 8): [[4, -1]]}),
        (8, {(8, 8): [[0, 1], [2, 3], [4, 5], [6, -1]]}),
    ],
)
def test_in_order_groups_sizes(bucket, expected):
    sizes = ((6, 8), (8, 6), (5, 8), (6, 8), (8, 7), (5, 8), (6, 8))
    got, found = list(in_order(Numbered(sizes), 2, bucket=bucket)), {}
    for batch in got:
        found.setdefault(batch["valid"].shape[1:], []).append(batch["index"].tolist())
    assert found == expected
    for batch in got:
        for row, index in enumerate(batch["index"]):
            height, width = sizes[index] if index >= 0 else (0, 0)
            inside = np.zeros(batch["valid"].shape[1:], bool)
            inside[:height, :width] = True
            np.testing.assert_array_equal(batch["valid"][row], inside)
            np.testing.assert_array_equal(batch["label"][row], np.where(inside, index, 255))
            np.testing.assert_array_equal(batch["image"][row, ..., 0], np.where(inside, index, 0))


def test_in_order_gives_full_batches_at_once():
    """An image that cannot be read ends the pass after what was complete before it."""
    sizes = ((6, 8), (8, 6)) * 4
    got = in_order(Numbered(sizes, broken=7), 2)
    assert [next(got)["index"].tolist() for _ in range(3)] == [[0, 2], [1, 3], [4, 6]]
    with pytest.raises(UserError, match="cannot be read"):
        next(got)


def test_in_order_gives_central_windows():
    sizes = ((6, 9), (4, 4), (3, 12))
    (batch,) = in_order(Numbered(sizes), 3, center=(4, 6))
    assert batch["image"].shape == (3, 4, 6, 3)
    np.testing.assert_array_equal(batch["image"][0, :, :, 1], [[1, 2, 3, 4, 5, 6]] * 4)
    np.testing.assert_array_equal(batch["image"][2, 0, :, 1], np.arange(3, 9))
    np.testing.assert_array_equal(batch["valid"].sum((1, 2)), [24, 16, 18])
    np.testing.assert_array_equal(batch["label"] == 255, ~batch["valid"])


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_in_order_shares_batches_between_processes(count):
    source = Numbered(((6, 8),) * count)
    shares = [list(in_order(source, 4, process_index=i, process_count=2)) for i in range(2)]
    together = [rows(a) + rows(b) for a, b in zip(*shares, strict=True)]
    padded = [*range(count), *[-1] * (-count % 4)]
    assert together == [padded[i : i + 4] for i in range(0, len(padded), 4)]


def test_in_order_refuses_sizes_that_differ_between_processes():
    source = Numbered(((6, 8),) * 3 + ((8, 6),))
    with pytest.raises(UserError, match="differ in size"):
        list(in_order(source, 2, process_index=1, process_count=2))


def image_name(index):
    return f"{index:03d}.{'jpg' if index == 4 else 'png'}"


@dataclasses.dataclass(frozen=True)
class Stored:
    """Images in files, as a reader opens them; the label of one follows its color."""

    folder: Path
    count: int = 12
    labels: bool = True
    info = DataInfo(("thing",), ((0, 0, 0),))

    @property
    def ids(self):
        return tuple(f"{i:03d}" for i in range(self.count))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.asarray(open_image(self.folder / image_name(index)))
        if not self.labels:
            return Record(image=image, id=self.ids[index])
        label = np.asarray(open_image(self.folder / f"label_{index:03d}.png"))
        return Record(image=image, label=label, id=self.ids[index])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


DAMAGE = {
    "003.png": truncate,
    "004.jpg": truncate,
    "label_005.png": truncate,
    "006.png": Path.unlink,
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Twelve images of noise: (a folder with all, one in which four are damaged)."""
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "damaged")]
    for folder in folders:
        rng = np.random.default_rng(0)
        for i in range(12):
            pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / image_name(i))
            Image.fromarray(pixels[..., 0]).save(folder / f"label_{i:03d}.png")
    for name, spoil in DAMAGE.items():
        spoil(folders[1] / name)
    return folders


def test_others_stand_in_for_damaged_images(stored):
    """The same batches but for the damaged images' rows, whoever reads them and from wherever."""
    noted, stream = [], Stream("labeled", 4)
    whole = run([Feed(stream, Stored(stored[0]), AUGMENT)], steps=9)
    feed = Feed(stream, Stored(stored[1]), AUGMENT, max_damaged=4)
    got = run([feed], steps=9, on_damage=lambda *damage: noted.append(damage))
    met = []
    for k, (one, other) in enumerate(zip(got, whole, strict=True)):
        assert set(one["labeled"]) == {"image", "label", "valid", "index"}
        for row, index in enumerate(other["labeled"]["index"].tolist()):
            if index in (3, 4, 5, 6):
                met.append((k, index))
                assert one["labeled"]["index"][row] not in (3, 4, 5, 6)
            else:
                for name, array in one["labeled"].items():
                    np.testing.assert_array_equal(array[row], other["labeled"][name][row])
    assert len(met) == 12  # four in each of three epochs
    # A substitute may be damaged, too, and is then noted beside the image whose turn it was.
    assert {(k, int(damage.id)) for k, damage in noted} >= set(met)
    assert {damage.id for _, damage in noted} == {"003", "004", "005", "006"}
    assert {damage.message.split()[2].rpartition("/")[2] for _, damage in noted} == set(DAMAGE)
    assert len({int(one["labeled"]["index"][row]) for one in got for row in range(4)}) == 8

    later = []
    with_workers = run(
        [feed], start=4, steps=9, workers=2, on_damage=lambda *damage: later.append(damage)
    )
    assert_equal(with_workers, got[4:])
    assert later == [(k, damage) for k, damage in noted if k >= 4]


@pytest.mark.parametrize(("limit", "workers"), [(0, 0), (1, 0), (1, 1)])
def test_too_many_damaged_images_in_a_row_are_an_error(stored, limit, workers):
    feed = Feed(Stream("labeled", 8), Stored(stored[1], count=8), AUGMENT, max_damaged=limit)
    with pytest.raises(UserError) as error:
        run([feed], steps=40, workers=workers)
    lines = str(error.value).splitlines()
    assert (
        f"{limit + 1} image(s) of 'labeled' cannot be read, data.max_damaged allows {limit}"
        in (lines[0])
    )
    assert "--config.data.max_damaged=N" in lines[0]
    assert len(lines) == 2 + limit
    assert all(any(name in line for name in DAMAGE) for line in lines[1:])


def test_every_image_is_opened_before_a_training(stored):
    check_all(Stored(stored[0]), "val")
    with pytest.raises(UserError) as error:
        check_all(Stored(stored[1]), "val")
    first, *lines = str(error.value).splitlines()
    assert first.startswith("4 of 12 image(s) of 'val' or their labels cannot be read.")
    for line, name in zip(lines, DAMAGE, strict=True):
        assert f"/{name} cannot be read" in line
    with pytest.raises(UserError, match=r"/009\.png cannot .*\n  and 2 more$"):
        check_all(Stored(stored[0] / "nowhere"), "val")
    with pytest.raises(UserError, match=r"1 of 3 .*\n  The file 1\.png cannot"):  # not damaged
        check_all(Numbered(((6, 8),) * 3, broken=1), "val")


def test_images_that_are_all_damaged_are_an_error(stored):
    source = Stored(stored[1] / "nowhere", count=5)
    with pytest.raises(UserError, match=r"5 image\(s\) of 'labeled'.*\n.*nowhere/00\d"):
        run([Feed(Stream("labeled", 1), source, AUGMENT, max_damaged=99)])


def test_unlabeled_images_do_not_mind_damaged_labels(stored):
    source = Stored(stored[1], labels=False)
    noted = []
    feed = Feed(Stream("unlabeled", 12, labels=None), source, AUGMENT, max_damaged=6)
    run([feed], steps=1, on_damage=lambda batch, damage: noted.append(damage.id))
    assert set(noted) == {"003", "004", "006"}


@pytest.mark.parametrize(
    ("maximum", "count", "limit"),
    [(None, 2975, 29), (None, 400, 10), (None, 8, 4), (None, 1, 0), (0, 400, 0), (60, 100, 60)],
)
def test_how_many_images_may_be_damaged(maximum, count, limit):
    assert quarantine.allowed(maximum, count) == limit


def test_quarantine_notes_an_image_once(tmp_path):
    said = []

    def opened(begin=0, process=0):
        limits = {"labeled": 3, "unlabeled": 0}
        return quarantine.Quarantine(tmp_path, "main", begin, limits, said.append, process)

    damage = [quarantine.Damage("labeled", f"{i}", f"The file {i}.png is bad.") for i in range(4)]
    first = opened()
    assert not list(tmp_path.iterdir())
    first.add(3, damage[0])
    first.add(5, damage[0])
    resumed = opened(begin=100)
    resumed.add(4, damage[0])
    resumed.add(4, damage[1])
    opened(process=2).add(7, damage[2])
    resumed.add(9, damage[2])  # another process has noted it
    assert len(said) == 3
    with pytest.raises(
        UserError, match=r"4 image\(s\) of 'labeled'.*allows 3(.*\n)*  The file 3\.png"
    ):
        resumed.add(9, damage[3])
    with pytest.raises(UserError, match=r"1 image\(s\) of 'unlabeled'.*allows 0"):
        opened().add(0, damage[0]._replace(stream="unlabeled"))

    def lines(name):
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    expected = {"stream": "labeled", "phase": "main"}
    message = "The file {}.png is bad."
    assert lines("quarantine.jsonl")[:2] == [
        expected | {"id": "0", "message": message.format(0), "step": 4},
        expected | {"id": "1", "message": message.format(1), "step": 105},
    ]
    assert lines("quarantine.2.jsonl") == [
        expected | {"id": "2", "message": message.format(2), "step": 8}
    ]


@dataclasses.dataclass(frozen=True)
class Classified(Numbered):
    """As `Numbered`, with i % 5 as the class of image i, unless it has none."""

    task = "classification"
    info = DataInfo(tuple("abcde"), ((0, 0, 0),) * 5, task)
    labeled: bool = True

    def __getitem__(self, index):
        record = super().__getitem__(index)
        record["label"] = np.uint8(index % 5)
        if not self.labeled:
            del record["label"]
        return record


def test_batches_of_classified_images():
    source = Classified(((12, 16),) * 10)
    augment = Augment((9, 11), pad=2, randaugment=1, cutout=4)
    feeds = [
        Feed(Stream("labeled", 4), source, augment),
        Feed(Stream("unlabeled", 6, labels=None), source, augment),
    ]
    for batch in run(feeds):
        assert set(batch["labeled"]) == {"image", "label", "index"}
        assert set(batch["unlabeled"]) == {"image", "index"}
        labeled = batch["labeled"]
        assert labeled["image"].shape == (4, 9, 11, 3)
        assert labeled["image"].dtype == labeled["label"].dtype == np.uint8
        np.testing.assert_array_equal(labeled["label"], labeled["index"] % 5)
    halves = [run(feeds, process_index=i, process_count=2) for i in range(2)]
    for batch, (one, other) in zip(run(feeds), zip(*halves, strict=True), strict=True):
        for name, array in batch["labeled"].items():
            joined = np.concatenate([one["labeled"][name], other["labeled"][name]])
            np.testing.assert_array_equal(joined, array)


def test_classified_images_in_order_have_labels_without_places():
    sizes = ((6, 8), (8, 6), (6, 8))
    batches = [*in_order(Classified(sizes), 2, bucket=32)]
    assert [batch["image"].shape for batch in batches] == [(2, 6, 8, 3), (2, 8, 6, 3)]
    (batch,) = in_order(Classified(sizes), 4, center=(4, 4))
    assert batch["image"].shape == (4, 4, 4, 3)
    assert batch["index"].tolist() == [0, 1, 2, -1]
    assert batch["label"].tolist() == [0, 1, 2, 255]
    assert batch["valid"].tolist() == [True, True, True, False]
    assert (batch["label"].dtype, batch["valid"].dtype) == (np.uint8, bool)
    # The columns of a wide image, from six to five, and of these the middle four.
    resized = np.asarray(Image.fromarray(Classified(sizes)[0]["image"]).resize((5, 4), 2))
    np.testing.assert_array_equal(batch["image"][0], resized[:, :4])
    (batch,) = in_order(Classified(sizes[:1], labeled=False), 1)
    assert set(batch) == {"image", "valid", "index"}


def test_processes_share_classified_images():
    source = Classified(((6, 8), (8, 6), (9, 9), (4, 4), (5, 7)))
    shares = [
        list(in_order(source, 4, center=(4, 4), process_index=i, process_count=2)) for i in range(2)
    ]
    found = [(batch["index"].tolist(), batch["label"].tolist()) for batch in shares[1]]
    assert found == [([2, 3], [2, 3]), ([-1, -1], [255, 255])]


@pytest.mark.parametrize("shape", [(5, 7), ()])
def test_filled_cuts_what_is_shaped_like_a_label(shape):
    padded = np.zeros((6, 9) if shape else (), bool)
    padded[tuple(map(slice, shape))] = True
    inside = filled(padded)
    values = np.arange(padded.size).reshape(padded.shape)
    np.testing.assert_array_equal(values[inside], values[tuple(map(slice, shape))])
    assert values[inside].shape == shape
