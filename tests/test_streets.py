import hashlib
import pickle
import re

import numpy as np
import pytest

from jaxssl.contracts import IGNORE_LABEL, UserError
from jaxssl.data import loading, streets, streets_scene
from jaxssl.data.cityscapes import INFO
from jaxssl.data.streets import Streets, render

SIZE = (64, 128)
# Of scenes 0, 1 and 2: the label's SHA-256, the mean of every channel. Only the label is compared
# exactly, since versions of Pillow differ in how they interpolate. Pictures that change on purpose
# need a new RENDERER_VERSION together with these.
SCENES = (
    ("3782144ea3e84bdedc7ceeadf138bd664f1a863835207174b989fb68d0495820", (87.2, 92.3, 75.9)),
    ("fe74a150d145b0cf4e9489a07a5ec3a9bb5a364caf19cbdda811786ed04c1dc8", (83.0, 77.7, 87.6)),
    ("d1d2b4223a3f50da0ba12d364ae0e20ea703c79f4af7b39c29dead7ed9c32716", (99.4, 98.5, 81.5)),
)


@pytest.fixture(scope="module")
def labels():
    """Labels of 200 scenes."""
    return np.stack([render(0, i, SIZE)[1] for i in range(200)])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that holds four small training images."""
    folder = str(tmp_path_factory.mktemp("cache"))
    Streets("train", 4, (16, 32), cache=folder)
    return folder


@pytest.fixture
def count_renders(monkeypatch):
    """The scenes rendered so far, as a list of indices."""
    rendered = []

    def counted(seed, index, size):
        rendered.append(index)
        return render(seed, index, size)

    monkeypatch.setattr(streets, "render", counted)
    return rendered


@pytest.mark.parametrize("index", range(len(SCENES)))
def test_scenes_stay_as_they_are(index):
    image, label = render(0, index, SIZE)
    digest, mean = SCENES[index]
    assert streets.RENDERER_VERSION == 3
    assert hashlib.sha256(label.tobytes()).hexdigest() == digest
    np.testing.assert_allclose(image.mean((0, 1)), mean, atol=0.5)


@pytest.mark.parametrize("size", [SIZE, (33, 65), (40, 40), (1, 1)])
def test_shapes_types_and_classes(size):
    image, label = render(3, 1, size)
    assert (image.shape, image.dtype) == ((*size, 3), np.uint8)
    assert (label.shape, label.dtype) == (size, np.uint8)
    assert set(np.unique(label)) <= {*range(INFO.num_classes), IGNORE_LABEL}


def test_depends_on_its_arguments_alone():
    image, label = render(5, 7, SIZE)
    np.random.default_rng(0).random()
    for again, expected in zip(render(5, 7, SIZE), (image, label), strict=True):
        np.testing.assert_array_equal(again, expected)
    for other in ((6, 7), (5, 8)):
        assert (render(*other, SIZE)[1] != label).mean() > 0.1


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("index", [0, 9])
def test_every_size_shows_the_same_scene(scale, index):
    image, label = render(0, index, SIZE)
    large_image, large_label = render(0, index, (64 * scale, 128 * scale))
    blocks = large_image.reshape(64, scale, 128, scale, 3).mean((1, 3))
    middle = slice(scale // 2, None, scale)
    assert (large_label[middle, middle] == label).mean() > 0.95
    assert np.abs(blocks - image).mean() < 8
    assert np.corrcoef(blocks.ravel(), image.ravel())[0, 1] > 0.95


def test_large_classes_are_about_as_common_as_in_cityscapes(labels):
    # Pixel shares and shares of images; Cityscapes' training set has road .37, building .23,
    # vegetation .16, car .07, sidewalk .06, sky .04. Trucks, trams and two-wheelers are more common
    # and nearer here than there, so that a small network has a chance to learn them.
    shares = np.bincount(labels.ravel(), minlength=256) / labels.size
    expected = {
        "road": (0.26, 0.4), "building": (0.18, 0.28), "vegetation": (0.11, 0.2),
        "sky": (0.04, 0.1), "car": (0.05, 0.12), "sidewalk": (0.04, 0.08),
    }  # fmt: skip
    for name, (low, high) in expected.items():
        assert low < shares[INFO.classes.index(name)] < high, name
    assert 0 < shares[IGNORE_LABEL] < 0.05


def test_rare_classes_are_in_few_images_and_most_images_have_many_classes(labels):
    present = (labels[..., None] == np.arange(INFO.num_classes)).sum((1, 2)) >= 4
    images = dict(zip(INFO.classes, present.mean(0), strict=True))
    assert all(0.02 < share <= 1 for share in images.values()), images
    for name in ("wall", "truck", "bus", "train", "motorcycle"):
        assert images[name] < 0.35, name
    assert np.mean((present.sum(1) >= 8) & (present.sum(1) <= 15)) > 0.8


def test_a_rectangle_lies_where_a_pinhole_camera_sees_it():
    camera = streets_scene.Camera(1.5, 1.2, 0.45, 0.1, 0.02, 0.001)
    light = streets_scene.Light((0,) * 3, (0,) * 3, (1,) * 3, (0,) * 3, streets_scene.UP, 100)
    canvas = streets_scene.Canvas(camera, light, (100, 200), oversampling=4)
    x0, x1, y0, y1, z = -1.0, 3.0, 0.5, 2.5, 8.0
    canvas.polygon([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], (255, 255, 255), "car")
    _, label = canvas.shrink()
    # From pixels back to meters: u, v in picture heights; the rolled horizon rises with u.
    v, u = (np.mgrid[:100, :200] + 0.5) / 100
    u = u - 1.0
    x = (u - 0.1) * z / 1.2 - 0.001 * z * z
    y = 1.5 - (v - 0.02 * u - 0.45) * z / 1.2
    expected = (x0 < x) & (x < x1) & (y0 < y) & (y < y1)
    assert expected.sum() > 1000
    assert ((label == INFO.classes.index("car")) != expected).sum() < 0.015 * expected.sum()


def test_source(cache):
    train, val = (
        Streets("train", 4, (16, 32), cache=cache),
        Streets("val", 3, (16, 32), cache=cache),
    )
    assert len(train) == len(train.ids) == 4
    assert train.info == INFO
    assert train.ids == tuple(sorted(set(train.ids)))
    assert all(re.fullmatch(r"[a-z]+_\d{6}_\d{6}", image_id) for image_id in train.ids + val.ids)
    assert not set(train.ids) & set(val.ids)
    for i, image_id in enumerate(train.ids):
        record, (image, label) = train[i], render(0, i, (16, 32))
        assert record["id"] == image_id
        np.testing.assert_array_equal(record["image"], image)
        np.testing.assert_array_equal(record["label"], label)
        assert all((val[k]["label"] != label).any() for k in range(len(val)))
    with pytest.raises(IndexError):
        train[4]


def test_fewer_images_are_the_first_ones(cache):
    few, many = (
        Streets("train", 2, (16, 32), cache=cache),
        Streets("train", 4, (16, 32), cache=cache),
    )
    assert few.ids == many.ids[:2]
    np.testing.assert_array_equal(few[1]["image"], many[1]["image"])


def test_records_may_be_changed(cache):
    source = Streets("train", 4, (16, 32), cache=cache)
    before = source[0]["image"].copy()
    source[0]["image"][:] = 0
    np.testing.assert_array_equal(source[0]["image"], before)


def test_renders_once(tmp_path, count_renders):
    calls = []
    for _ in range(2):
        Streets("train", 3, (8, 16), cache=str(tmp_path), progress=lambda *c: calls.append(c))
    assert count_renders == [0, 1, 2]
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"size": (8, 18)}, {"split": "val"}])
def test_other_pictures_have_another_file(tmp_path, count_renders, change):
    settings = {"split": "train", "count": 1, "size": (8, 16), "cache": str(tmp_path)}
    Streets(**settings)
    Streets(**settings | change)
    assert len(count_renders) == 2


def test_another_renderer_reads_no_old_pictures(tmp_path, count_renders, monkeypatch):
    for version in (1, 2):
        monkeypatch.setattr(streets, "RENDERER_VERSION", version)
        Streets("train", 1, (8, 16), cache=str(tmp_path))
    assert len(count_renders) == 2


def test_what_is_interrupted_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Streets("train", 2, (8, 16), cache=str(tmp_path), progress=interrupt)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_two_may_render_at_once(tmp_path):
    others = []

    def start_another(done, total):
        if done == 1:
            others.append(Streets("train", 2, (8, 16), cache=str(tmp_path)))

    one = Streets("train", 2, (8, 16), cache=str(tmp_path), progress=start_another)
    for source in (one, others[0]):
        np.testing.assert_array_equal(source[1]["image"], render(0, 1, (8, 16))[0])
    names = sorted(path.name for path in tmp_path.rglob("*.*"))
    assert [name.rpartition("-")[2] for name in names] == ["image.npy", "label.npy"]


def test_pickles_without_pictures(cache):
    source = Streets("train", 4, (16, 32), cache=cache)
    record = source[2]
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000 < record["image"].size
    np.testing.assert_array_equal(pickle.loads(pickled)[2]["label"], record["label"])


def test_never_opens_labels_it_was_not_asked_for(tmp_path, count_renders):
    Streets("train", 2, (8, 16), cache=str(tmp_path))
    (path,) = tmp_path.rglob("*-label.npy")
    path.unlink()
    source = Streets("train", 2, (8, 16), labels=False, cache=str(tmp_path))
    assert set(source[1]) == {"image", "id"}
    assert not path.exists()
    assert len(count_renders) == 2


def test_load_fills_the_default_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config_data = {
        "name": "streets",
        "train_count": 3,
        "val_count": 1,
        "scene_seed": 0,
        "size": (8, 16),
    }
    source = loading.load(config_data, "train", True, ["streets_000001_000019"])
    np.testing.assert_array_equal(source[0]["label"], render(0, 1, (8, 16))[1])
    assert len(loading.load(config_data, "val", False)) == 1
    (folder,) = (tmp_path / "jaxssl").iterdir()
    assert folder.name == f"streets-{streets.RENDERER_VERSION}"
    with pytest.raises(UserError, match="train, val"):
        loading.load(config_data, "train_extra", False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "train, val"),
        ({"count": 0}, "0 images"),
        ({"count": 1_000_001}, "1000001 images"),
        ({"seed": -1}, "seed -1"),
        ({"size": (0, 16)}, r"\(0, 16\)"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        Streets(**{"split": "train", "count": 1, **settings})


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        Streets("train", 1, (8, 16), cache=str(tmp_path / "file"))


def test_a_damaged_cache(tmp_path):
    source = Streets("train", 1, (8, 16), cache=str(tmp_path))
    (path,) = tmp_path.rglob("*-image.npy")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="Delete that file"):
        source[0]
