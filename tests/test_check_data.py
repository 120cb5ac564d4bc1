import io
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import test_tfds
from PIL import Image

from jaxssl import check_data
from jaxssl import config as configs
from jaxssl.contracts import DataInfo, Record, UserError
from jaxssl.logs import Console
from jaxssl.models import pretrained

ROOT = Path(__file__).parents[1]
NAMES = [f"scene {i}" for i in range(8)]


def image(seed, size=(40, 50)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def mask(seed, size=(40, 50)):
    """Two classes, and some pixels to ignore in the corner."""
    label = (np.random.default_rng(seed).random(size) < 0.25).astype(np.uint8)
    label[:4, :5] = 255
    return label


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def root(tmp_path):
    """Eight labeled images, three without masks, two for validation."""
    for seed, name in enumerate(NAMES):
        save(tmp_path / f"images/{name}.PNG", image(seed))
        save(tmp_path / f"labels/{name}.png", mask(seed))
    for seed in (20, 21, 22, 23):
        save(tmp_path / f"unlabeled/{seed}.jpg", image(seed, (seed + 20, 60)))
    for seed in (30, 31):
        save(tmp_path / f"val/images/{seed}.png", image(seed))
        save(tmp_path / f"val/labels/{seed}.png", mask(seed))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    return tmp_path


def config(root, method="mkd", **settings):
    config = configs.folder("small")
    with config.unlocked():
        config.method.name = method
    config.update_from_flattened_dict({"data.root": str(root), **settings})
    return config


def check(config):
    """Exit code and what is printed."""
    stream = io.StringIO()
    return check_data.check(config, Console(stream)), stream.getvalue()


@pytest.fixture(autouse=True)
def use_devices(monkeypatch):
    """Makes jax see some of the devices, two if nothing else is said."""
    every = jax.devices()

    def use(count):
        monkeypatch.setattr(jax, "devices", lambda: every[:count])

    use(2)
    return use


def rows(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def listing(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_sound_folder_would_train(root):
    save(root / "images/scene 0.PNG", np.dstack([image(0)[..., 0]] * 3))
    save(root / "labels/scene 0.png", np.where(mask(0) == 1, 0, mask(0)))
    before = listing(root)
    code, text = check(config(root))
    assert code == 0, text
    assert listing(root) == before
    lines = rows(text)
    assert "labeled 40x50 8 1 1 to 2 0 0" in lines
    assert "unlabeled 40x60 to 43x60, 4 sizes 4 0 - 0 0" in lines
    assert "val 40x50 2 0 2 0 0" in lines
    assert "Training would start." in lines
    assert "Warning" not in text
    stacked = np.stack([mask(seed) for seed in range(1, 8)] + [np.where(mask(0) == 1, 0, mask(0))])
    share = 100 * (stacked == 1).sum() / (stacked < 2).sum()
    assert any(line.startswith(f"road {share:.2f} 7 ") for line in lines)
    assert any(line.startswith("(ignored) 1.00 8 1.00 2") for line in lines)


def spoil_unreadable_val(root):
    path = root / "val/images/30.png"
    path.write_bytes(path.read_bytes()[:500])


def spoil_size(root):
    save(root / "labels/scene 2.png", mask(2, (50, 40)))


def spoil_value(root):
    label = mask(3)
    label[10:20] = 7
    save(root / "labels/scene 3.png", label)


def spoil_many(root):
    for name in NAMES[:5]:
        (root / f"images/{name}.PNG").write_bytes(b"no image")


def spoil_labels(root):
    for name in NAMES:
        save(root / f"labels/{name}.png", np.full((40, 50), 255, np.uint8))


def spoil_name(root):
    save(root / "labels/stranger.png", mask(0))


def spoil_batch(root):
    for path in (root / "unlabeled").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_unreadable_val, "1 of val cannot be read: .*30.png"),
        (spoil_size, "1 of 8 of labeled: .*scene 2.png is 40x50 pixels.*scene 2.PNG is 50x40"),
        (spoil_value, r"scene 3.png holds the class id 7\. .*"),
        (spoil_many, "5 of labeled cannot be read: .*scene 4.PNG"),
        (spoil_labels, "No pixel of labeled has a class"),
        (spoil_name, r"1 of 9 masks .* labels/stranger\.png"),
        (spoil_batch, "no images for the stream 'unlabeled'.* number of labels to keep"),
    ],
)
def test_what_would_end_training_is_named(root, spoil, words):
    spoil(root)
    code, text = check(config(root))
    failures = " ".join(text.partition("Training would fail")[2].split())
    assert code == 1
    assert "Training would start" not in text
    assert re.search(words, failures), text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval.mode": "foo"}, "Unknown eval.mode 'foo'"),
        ({"eval.window": (5,)}, r"eval.window=\(5,\) is no size"),
        ({"model.backbone": "foo"}, "backbone.*foo"),
        ({"optimizer.name": "foo"}, "Unknown optimizer.name 'foo'"),
        ({"optimizer.schedule": "foo"}, "Unknown optimizer.schedule 'foo'"),
        ({"batch.accumulate": 3}, "batch.unlabeled=4 .* batch.accumulate=3 and 2 devices"),
        ({"batch.labeled": 3}, "batch.labeled=3 .* batch.accumulate=1 and 2 devices"),
        ({"steps": 0}, "steps=0 is too small"),
    ],
)
def test_a_config_that_training_refuses_is_named_and_the_data_are_looked_at(root, settings, words):
    code, text = check(config(root, **settings))
    assert code == 1
    assert re.search(f"Training would fail: .*{words}", text), text
    assert "labeled 40x50 8 0 2 0 0" in rows(text)
    assert "Pixels of masks" in text


def test_batches_have_to_fit_the_devices(root, use_devices):
    use_devices(3)
    assert check(config(root))[0] == 0
    use_devices(8)
    code, text = check(config(root))
    assert code == 1
    assert "batch.unlabeled=4 cannot be split evenly over batch.accumulate=1 and 8 devices" in text


def test_weights_that_are_not_installed_are_named(root, monkeypatch):
    key = ("efficientnet_lite0", "imagenet")
    monkeypatch.setitem(pretrained.FILES, key, pretrained.File("no-such-package", "", str))
    settings = {"model.backbone": key[0], "model.pretrained": key[1]}
    code, text = check(config(root, **settings))
    assert code == 1
    assert "Training would fail: The pretrained weights are in the package no-such-package" in text


def classified(data):
    """A config for labels of whole images."""
    config = configs.default()
    with config.unlocked():
        config.method.name = "supervised"
        config.data.update(data)
    config.update_from_flattened_dict({"steps": 1, "batch.labeled": 2, "crop": (8, 8)})
    return config


def test_class_ids_are_looked_at(tmp_path):
    data = test_tfds.prepare(tmp_path) | {"label_key": "label", "classes": (), "split": "2"}
    _, text = check(classified(data))
    assert "5 100.00 2 100.00 3" in rows(text)
    assert "Warning: 36 classes are absent in labeled" in text
    assert "masks" not in text


def test_a_folder_for_each_class(tmp_path):
    for name, count in {"cat": 6, "dog": 5}.items():
        for i in range(count):
            save(tmp_path / f"train/{name}/{i}.png", image(10 * len(name) + i + count, (9, 10)))
    save(tmp_path / "val/cat/copy.png", image(37, (9, 10)))
    save(tmp_path / "val/dog/gray.png", np.dstack([image(1)[..., 0]] * 3))
    (tmp_path / "val/dog/broken.png").write_bytes(b"no image")
    (tmp_path / "unlabeled").mkdir()
    save(tmp_path / "unlabeled/x.png", image(99))
    data = {"name": "class_folders", "root": str(tmp_path), "split": "4", "extra": True}
    _, text = check(classified({**data, "validation": 2}))
    lines = rows(text)
    assert "set height x width images gray classes unreadable refused" in lines
    assert "labeled 9x10 4 0 2 0 0" in lines
    assert "unlabeled 9x10 to 40x50, 2 sizes 6 0 - 0 0" in lines
    assert "holdout 9x10 2 0 2 0 0" in lines
    assert "val 9x10 to 40x50, 2 sizes 3 1 2 1 0" in lines
    assert "cat 50.00 2 50.00 1 50.00 1" in lines
    assert re.search(r"1 pictures are in \w+ and in val: train/cat/1 and val/cat/copy", text)
    assert re.search(r"Training would fail: 1 of val cannot be read: .*broken\.png", text, re.S)
    assert "masks" not in text


def test_images_are_looked_at_where_no_class_table_can_be_made(root):
    (root / "classes.txt").unlink()
    save(root / "labels/scene 1.png", image(1)[..., 0])
    (root / "images/scene 5.PNG").write_bytes(b"no image")
    (root / "val/images/30.png").write_bytes(b"no image")
    code, text = check(config(root))
    failures = text.partition("Training would fail")[2]
    assert code == 1
    assert "labeled 40x50 8 0 - 1 0" in rows(text)
    assert "unlabeled 40x60 to 43x60, 4 sizes 4 0 - 0 0" in rows(text)
    assert "val 40x50 2 0 - 1 0" in rows(text)
    assert "1 of labeled cannot be read" in text
    assert "val/images/30.png" in failures
    assert "labels/scene 1.png" in failures
    assert "No pixel" not in text
    assert "Warning: The masks were not compared with the images." in text


def test_images_of_refused_masks_count(root):
    for name in NAMES:
        save(root / f"labels/{name}.png", np.full((40, 50), 9, np.uint8))
    code, text = check(config(root))
    assert code == 1
    assert "labeled 40x50 8 0 - 0 8" in rows(text)
    assert "8 of 8 of labeled" in text
    assert "No pixel of labeled" not in text


def test_supervised_training_needs_no_unlabeled_images(root):
    spoil_batch(root)
    assert check(config(root, "supervised"))[0] == 0


def test_a_value_to_ignore_is_suggested(root):
    spoil_value(root)
    save(root / "labels/scene 4.png", np.full((40, 50), 7, np.uint8))
    _, text = check(config(root))
    assert "7 (2500 pixels in 2 masks)" in text
    assert "--config.data.ignore=255,7" in text
    assert check(config(root, **{"data.ignore": (255, 7)}))[0] == 0


def test_what_training_puts_up_with_is_a_warning(root, monkeypatch):
    (root / "classes.txt").write_text("sky\nroad\nunicorn\n")
    (root / "unlabeled/20.jpg").write_bytes(b"no image")
    save(root / "unlabeled/copy.png", image(31))
    save(root / "unlabeled/another copy.png", image(2))
    monkeypatch.setattr(check_data, "LARGE", 42 * 60)
    code, text = check(config(root))
    assert code == 0, text
    for words in (
        "1 classes are absent in labeled: unicorn",
        "1 classes are absent in val: unicorn",
        "1 of unlabeled cannot be read; training puts other images in their place",
        "1 pictures are in unlabeled and in val: unlabeled/copy and val/31",
        "1 pictures are in labeled and in unlabeled: scene 2 and unlabeled/another copy",
        "1 images of unlabeled have more than",
    ):
        assert f"Warning: {words}" in text
    assert "unicorn absent 0 absent 0" in " ".join(text.split())


def test_ids_in_training_and_validation_are_a_warning(root):
    pairs = [f"images/{name}.PNG labels/{name}.png\n" for name in NAMES]
    (root / "train.txt").write_text("".join(pairs[:7]))
    (root / "unlabeled.txt").write_text("unlabeled/20.jpg\nunlabeled/21.jpg\nimages/scene 7.PNG\n")
    (root / "val.txt").write_text("".join(pairs[5:]))
    code, text = check(config(root))
    assert code == 0, text
    assert "Warning: 2 ids are in labeled and in val: images/scene 5, images/scene 6." in text
    assert "Warning: 1 ids are in unlabeled and in val: images/scene 7." in text


def test_overlap_on_purpose_is_no_warning(root):
    code, text = check(config(root, **{"data.overlap": True}))
    assert code == 0, text
    assert "unlabeled 40x50 to 43x60" in " ".join(text.split())
    assert "Warning" not in text


def test_streets_are_checked_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    streets = configs.default()
    configs.use_streets(streets, "4")
    with streets.unlocked():
        streets.method.name = "cps"
    streets.data.update(size=(16, 32), train_count=12, val_count=2)
    code, text = check(streets)
    assert code == 0, text
    assert re.search(r"labeled 16x32 4 0 \d+( to \d+)? 0 0 ", " ".join(text.split()))


def test_a_wrong_method_is_no_matter_of_the_data(root):
    with pytest.raises(UserError, match="no_such_method"):
        check(config(root, "no_such_method"))


class Made:
    """Images that are made when they are read, by a function of their index."""

    info = DataInfo(("sky", "road"), ((0, 0, 0), (128, 64, 128)))

    def __init__(self, count, read):
        self.ids = tuple(f"{i:04d}" for i in range(count))
        self._read = read

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self._read(index)
        return Record(image=np.zeros((2, 3, 3), np.uint8), id=self.ids[index])


class Heard(Console):
    """Notes what it is told."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def phase(self, name, steps, start=0, *, unit="steps"):
        self.heard.append((name, steps, unit))

    def step(self, step):
        self.heard.append(step)


def test_images_are_read_side_by_side_with_progress():
    both = threading.Barrier(2)
    source = Made(4, lambda index: both.wait(timeout=60))  # which one reader alone never passes
    console = Heard()
    found = check_data.inspect(source, source, "labeled", console)
    assert found.sizes == {(2, 3): 4}
    assert console.heard == [("labeled", 4, "images"), 1, 2, 3, 4]


def test_ctrl_c_leaves_the_rest_unread(monkeypatch):
    def interrupt(self, step):
        raise KeyboardInterrupt

    read = []
    source = Made(2000, lambda index: (read.append(index), time.sleep(0.01)))
    monkeypatch.setattr(Heard, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check_data.inspect(source, source, "labeled", Heard())
    assert len(read) < 2000


def run(arguments):
    """Python with some arguments, and one device."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        check=False,
    )


INTERRUPTED = """
import os, signal, time
from jaxssl import check_data
check_data.inspect = lambda *_: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))
from absl import app
from jaxssl import main
app.run(check_data.run, flags_parser=main.parse)
"""


def test_ctrl_c_is_one_line(root):
    config = "--config=configs/supervised_folder.py:small"
    done = run(["-c", INTERRUPTED, config, f"--config.data.root={root}"])
    assert done.returncode == 130, done.stderr
    assert done.stderr == "Stopped before all was looked at.\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--config=configs/supervised_folder.py:small", "--config.data.root={root}"], 0),
        (["--config=configs/supervised_folder.py:small", "--config.data.root={root}/none"], 1),
        (["--config=configs/supervised_folder.py:tiny"], 2),
        ([], 2),
    ],
)
def test_exit_codes_of_the_command(root, arguments, code):
    done = run(["-m", "jaxssl.check_data", *(a.format(root=root) for a in arguments)])
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("Training would start." in done.stdout) == (code == 0)
    assert done.stderr.startswith("error: ") == (code == 2)
