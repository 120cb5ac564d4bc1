"""Predictions are those of the network, in files as promised, and nothing else is touched."""

import json
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import Linear, forward, nearest
from PIL import Image
from test_trained import contents, make_workdir

from jaxssl import models
from jaxssl.contracts import UnreadableError
from jaxssl.data import cityscapes
from jaxssl.inference import Presentation
from jaxssl.predict import Predictor, main, probabilities, tiling
from jaxssl.predictions import find_images, read_image

PALETTE = np.array([[0, 0, 255], [128, 64, 0], [0, 160, 0], [255, 0, 0]])


def noise(height, width, seed=0):
    """Smooth colors, so that a JPEG file keeps them."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    return np.repeat(np.repeat(blocks, 4, 0), 4, 1)[:height, :width].astype(np.uint8)


def logits_of(variables, image):
    """Logits of `Linear` at the size of an image `[h,w,3]`, in NumPy."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)))[None]
    valid = np.pad(np.ones((height, width), bool), ((0, height % 2), (0, width % 2)))[None]
    logits, _, _ = forward(variables, padded, valid, batch_stats=False)
    return nearest(logits, padded.shape[1:3])[0, :height, :width]


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


@pytest.fixture
def variables():
    return Linear().init(jax.random.key(3), (16, 24))


@pytest.mark.parametrize("size", [(16, 24), (31, 18), (1, 1)])
def test_predictor_is_the_network_at_the_size_of_the_image(variables, size):
    devices = jax.devices()[:2]
    make = Predictor(
        Linear(), variables, Presentation(), 4, read=probabilities, bucket=8, devices=devices
    )
    image = noise(*size)
    found, expected = make(image), logits_of(variables, image)
    np.testing.assert_array_equal(found.labels, expected.argmax(-1))
    np.testing.assert_allclose(found.probabilities, softmax(expected), atol=1e-3)
    np.testing.assert_allclose(found.confidence / 65535, softmax(expected).max(-1), atol=2e-5)
    assert [array.dtype for array in found[:3]] == [np.uint8, np.uint16, np.float16]
    assert found.tiles == 1


def test_a_large_image_is_put_together_from_tiles(variables):
    predictor = Predictor(
        Linear(), variables, Presentation(), 4, bucket=2, devices=jax.devices()[:1], max_pixels=400
    )
    image = noise(50, 70)
    found, times = predictor(image), np.zeros((50, 70), int)
    for tile in tiling((50, 70), 400):
        expected = logits_of(variables, image[tile.seen]).argmax(-1)[tile.inner]
        np.testing.assert_array_equal(found.labels[tile.kept], expected)
        times[tile.kept] += 1
    assert (times == 1).all()
    assert found.tiles > 1
    assert found.confidence is None


@pytest.mark.parametrize("size", [(50, 70), (3000, 4000), (9, 5000), (5000, 9), (101, 100)])
def test_tiles_cover_an_image_and_see_around_what_they_keep(size):
    limit = 10_000
    tiles = tiling(size, limit)
    seen = [tuple(s.stop - s.start for s in tile.seen) for tile in tiles]
    assert len(set(seen)) == 1
    assert np.prod(seen[0]) <= limit
    covered = sum(np.prod([s.stop - s.start for s in tile.kept]) for tile in tiles)
    assert covered == np.prod(size)
    for tile in tiles:
        for side, seen, kept, inner in zip(size, *tile, strict=True):
            assert (seen.start + inner.start, seen.start + inner.stop) == (kept.start, kept.stop)
            margin = (seen.stop - seen.start) // 8
            assert kept.start == 0 or kept.start - seen.start >= margin
            assert kept.stop == side or seen.stop - kept.stop >= margin


def test_images_of_one_piece_are_not_cut():
    assert len(tiling((1024, 2048), 2**26 // 19)) == 1


def oriented(path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(noise(12, 20)).save(path, exif=exif)


def test_a_picture_is_read_as_viewers_show_it(tmp_path):
    oriented(tmp_path / "phone.png")
    np.testing.assert_array_equal(read_image(tmp_path / "phone.png"), np.rot90(noise(12, 20), -1))


def test_what_is_no_picture_is_refused(tmp_path, monkeypatch):
    for name in ("float.tiff", "text.png", "bomb.png"):
        Image.fromarray(np.zeros((30, 30), np.float32 if "float" in name else np.uint8)).save(
            tmp_path / name
        )
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name in ("float.tiff", "text.png", "bomb.png", "absent.png"):
        with pytest.raises(UnreadableError):
            read_image(tmp_path / name)


def test_images_are_found_in_subfolders(tmp_path):
    names = [
        "b.JPG",
        "a/c.png",
        "a/._c.png",
        "notes.txt",
        "out/labels/b.png",
        ".x/d.png",
        "a/é.webp",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images(tmp_path, leave_out=tmp_path / "out")
    assert [path.as_posix() for path in found] == ["a/c.png", "a/é.webp", "b.JPG"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "w"
    return path, make_workdir(path)


@pytest.fixture(autouse=True)
def _few_and_small(monkeypatch):
    monkeypatch.setattr(models, "load", lambda config, num_classes, **_: Linear(num_classes))
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)


@pytest.fixture
def images(tmp_path):
    """Pictures of several kinds, a broken one, and what is none."""
    folder = tmp_path / "in"
    (folder / "sub dir").mkdir(parents=True)
    first, second = Image.fromarray(noise(16, 24)), Image.fromarray(noise(20, 33, 1))
    first.save(folder / "a.PNG")
    second.save(folder / "sub dir" / "b.v2.jpg", quality=95)
    second.convert("RGBA").save(folder / "rgba.png")
    second.convert("L").save(folder / "gray.bmp")
    oriented(folder / "phone.jpg")
    (folder / "broken.png").write_bytes((folder / "rgba.png").read_bytes()[:300])
    (folder / "notes.txt").write_text("mine")
    return folder


NAMES = {"a": "a.PNG", "sub dir/b.v2": "sub dir/b.v2.jpg", "rgba": "rgba.png", "gray": "gray.bmp"}
NAMES |= {"phone": "phone.jpg"}


def run(workdir, images, out, *more):
    return main([f"--workdir={workdir}", f"--input={images}", f"--output={out}", *more])


def test_a_folder_is_labeled(saved, images, tmp_path, capsys):
    (workdir, state), out, before = saved, tmp_path / "out", contents(images)
    assert run(workdir, images, out, "--network=teacher_b", "--step=last", "--probabilities") == 1
    printed = capsys.readouterr().out
    assert "broken.png cannot be read" in printed
    assert "labeled 5 of 6 images" in printed
    assert "Failed, for the reasons above: 1" in printed
    variables = jax.tree.map(lambda x: x + 6, state.network("teacher_b"))
    for name, file in NAMES.items():
        image = read_image(images / file)
        logits = logits_of(variables, image)
        labels = Image.open(out / "labels" / f"{name}.png")
        np.testing.assert_array_equal(np.asarray(labels), logits.argmax(-1))
        np.testing.assert_array_equal(np.asarray(labels.convert("RGB")), PALETTE[logits.argmax(-1)])
        overlay = np.asarray(Image.open(out / "overlays" / f"{name}.jpg"), float)
        blend = (image + PALETTE[np.asarray(labels)]) / 2
        assert np.abs(overlay - blend).mean() < 12  # of 255: JPEG
        stored = np.load(out / "probabilities" / f"{name}.npz")["probabilities"]
        np.testing.assert_allclose(stored, softmax(logits), atol=1e-3)
        confidence = np.asarray(Image.open(out / "confidence" / f"{name}.png"))
        np.testing.assert_allclose(confidence / 65535, softmax(logits).max(-1), atol=1e-4)
    assert len([path for path in out.rglob("*") if path.is_file()]) == 4 * len(NAMES) + 2
    assert contents(images) == before


def test_a_rerun_goes_on_and_overwrites_only_when_told(saved, images, tmp_path, capsys):
    (images / "broken.png").unlink()
    out, workdir = tmp_path / "out", saved[0]
    assert run(workdir, images, out) == 0
    before = contents(out)
    (out / "labels" / "gray.png").unlink()
    mine = Path("overlays/gray.jpg")
    (out / mine).write_text("mine")
    assert run(workdir, images, out) == 0
    assert "4 of them labeled before" in capsys.readouterr().out
    after = contents(out)
    assert after.keys() == before.keys()
    assert after[mine][1] == b"mine"
    for name in NAMES:
        label = Path("labels", f"{name}.png")
        assert after[label][1] == before[label][1]
        assert (after[label][0] == before[label][0]) == (name != "gray")
    assert run(workdir, images, out, "--overwrite") == 0
    assert contents(out)[mine][1] == before[mine][1]


def test_an_image_that_changed_is_labeled_again(saved, images, tmp_path, capsys):
    (images / "broken.png").unlink()
    out = tmp_path / "out"
    assert run(saved[0], images, out) == 0
    before = contents(out)
    Image.fromarray(noise(20, 33, seed=9)).convert("L").save(images / "gray.bmp")
    later = time.time() + 1
    os.utime(images / "gray.bmp", (later, later))
    (images / "a.PNG").unlink()
    (images / "a.PNG").symlink_to(tmp_path / "gone")  # its outputs are there
    assert run(saved[0], images, out) == 0
    assert "4 of them labeled before" in capsys.readouterr().out
    after = contents(out)
    written = {
        path.as_posix() for path in after if path.parent.name and after[path] != before[path]
    }
    assert written == {"labels/gray.png", "overlays/gray.jpg"}
    overlay = Path("overlays/gray.jpg")
    assert after[overlay][1] != before[overlay][1]


def test_predictions_of_two_folders_do_not_mix(saved, images, tmp_path, capsys):
    """Outputs have an image's path in the input, which two folders may share."""
    other, out = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    Image.fromarray(noise(16, 24, seed=9)).save(other / "a.png")
    assert run(saved[0], other, out) == 0
    before = contents(out)
    for source in (images / "a.PNG", images):
        assert run(saved[0], source, out) == 2
        assert f'"input": "{other}"' in capsys.readouterr().err
    assert contents(out) == before
    assert run(saved[0], other / "a.png", out) == 0  # the same image


def test_a_file_is_labeled_and_the_output_may_lie_among_the_images(saved, images, capsys):
    assert run(saved[0], images / "gray.bmp", images / "out", "--nooverlay") == 0
    assert not (images / "out" / "overlays").exists()
    assert run(saved[0], images, images / "out", "--nooverlay") == 1
    assert "6 in " in capsys.readouterr().out  # not its own outputs


def test_mode_reaches_the_network(saved, images, tmp_path, capsys):
    args = ("--mode=slide", "--window=8,8", "--stride=4,4", "--flip")
    assert run(saved[0], images / "a.PNG", tmp_path / "out", *args) == 0
    assert "slide 8x8 stride 4x4, flip" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["mode"] == (
        "slide 8x8 stride 4x4, flip"
    )


def test_label_ids_are_what_the_server_takes(images, tmp_path):
    info = cityscapes.INFO
    classes = {"classes": info.classes, "palette": info.palette, "task": info.task}
    state = make_workdir(tmp_path / "w", classes=classes)
    name = "berlin_000000_000019_leftImg8bit.png"
    shutil.copy(images / "a.PNG", images / "sub dir" / name)
    args = ("--label_ids", "--nooverlay")
    assert run(tmp_path / "w", images / "sub dir", tmp_path / "out", *args) == 0
    written = Image.open(tmp_path / "out/label_ids/berlin_000000_000019_labelIds.png")
    assert written.mode == "L"
    variables = jax.tree.map(lambda x: x + 4, state.network("a"))
    labels = logits_of(variables, noise(16, 24)).argmax(-1)
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    np.testing.assert_array_equal(np.asarray(written), np.array(ids)[labels])


REFUSED = {
    "foreign output": (["--output={images}/sub dir"], "files that this command did not make"),
    "output is input": (["--output={images}"], "files that this command did not make"),
    "no input": (["--input=/nowhere"], "no file or folder /nowhere"),
    "no images": (["--input={workdir}"], "There is no image in"),
    "one name twice": (["--input={images}"], "A.jpeg and a.PNG would both be written to"),
    "other classes": (["--label_ids"], "other classes: sky, ground"),
    "no network": (["--network=c"], "a, b, teacher_a, teacher_b"),
    "no step": (["--step=5"], "one of 4, 6"),
    "no run": (["--workdir=/nowhere"], "--workdir of a training run"),
    "window": (["--mode=slide", "--window=8"], "Give height and width"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_message_and_writes_nothing(saved, images, tmp_path, capsys, case):
    flags, words = REFUSED[case]
    if case == "one name twice":
        shutil.copy(images / "rgba.png", images / "A.jpeg")
    before = contents(tmp_path)
    more = [flag.format(images=images, workdir=saved[0]) for flag in flags]
    assert run(saved[0], images, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert contents(tmp_path) == before


def test_predictions_of_two_networks_do_not_mix(saved, images, tmp_path, capsys):
    assert run(saved[0], images / "a.PNG", tmp_path / "out") == 0
    assert run(saved[0], images / "a.PNG", tmp_path / "out", "--network=b") == 2
    assert "belongs to another input, network or mode" in capsys.readouterr().err


def test_a_full_disk_ends_it_with_one_message(saved, images, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "putpalette", full)
    assert run(saved[0], images, tmp_path / "out") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.part"))
