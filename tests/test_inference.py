import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Linear, Small, forward, nearest
from PIL import Image

from jaxssl import config as configs
from jaxssl.contracts import IGNORE_LABEL, Outputs, UserError, Variables
from jaxssl.inference import Presentation, halve, make_predict

NOTHING = Variables({}, {})


@dataclasses.dataclass(frozen=True)
class Context:
    """Every logit depends on all that the network is shown, and on where in it; `look` is its twin
    in NumPy.
    """

    def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
        assert not batch_stats
        share = valid[..., None].astype(jnp.float32)
        x = image * share / 255
        mean = x.sum((1, 2), keepdims=True) / share.sum((1, 2), keepdims=True)
        return Outputs(x + 2 * mean + jnp.linspace(0, 1, image.shape[2])[:, None]), stats

    def resize(self, logits, size):
        assert logits.shape[1:3] == size
        return logits


def look(image, valid):
    """`Context` on one image `[h,w,3]`, float64."""
    x = np.where(valid[..., None], image / 255, 0)
    return x + 2 * x.sum((0, 1)) / valid.sum() + np.linspace(0, 1, image.shape[1])[:, None]


def example(size, seed=0, images=2):
    rng = np.random.default_rng(seed)
    valid = np.ones((images, *size), bool)
    valid[0, -size[0] // 5 :] = valid[0, :, -size[1] // 4 :] = False
    return rng.integers(0, 256, (images, *size, 3), np.uint8), valid


def predict(how, image, valid, net=None, variables=NOTHING):
    return jax.jit(make_predict(net or Context(), how))(variables, image, valid)


def test_whole_is_one_forward_pass_resized_to_the_image():
    image, valid = example((16, 24))
    variables = Linear().init(jax.random.key(0), (16, 24))
    logits = predict(Presentation(), image, valid, Linear(), variables)
    expected, _, _ = forward(variables, image, valid, batch_stats=False)
    np.testing.assert_allclose(logits, nearest(expected, (16, 24)), rtol=1e-4, atol=1e-5)
    assert logits.dtype == np.float32


@pytest.mark.parametrize(
    ("window", "stride", "tops", "lefts"),
    [
        ((8, 8), (8, 8), (0, 8, 12), (0, 8, 16, 19)),
        ((12, 15), (8, 10), (0, 8), (0, 10, 12)),
        ((20, 9), (1, 9), (0,), (0, 9, 18)),
        ((64, 26), (40, 1), (0,), (0, 1)),  # higher than the image
    ],
)
def test_slide_averages_windows(window, stride, tops, lefts):
    """The last window ends with the image; by hand, its first pixels are given."""
    size = (20, 27)
    image, valid = example(size)
    total, times = np.zeros((*image.shape[:3], 3)), np.zeros((*size, 1))
    for top in tops:
        for left in lefts:
            place = slice(top, top + window[0]), slice(left, left + window[1])
            times[place] += 1
            for i in range(len(image)):
                total[i][place] += look(image[i][place], valid[i][place])
    logits = predict(Presentation("slide", window, stride), image, valid)
    np.testing.assert_allclose(logits, total / times, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [(32, 48), (40, 64)])
def test_slide_is_whole_where_the_window_covers_the_image(window):
    image, valid = example((32, 48))
    net = Small()
    variables = net.init(jax.random.key(0), (32, 48))
    whole = predict(Presentation(), image, valid, net, variables)
    slide = predict(Presentation("slide", window, (16, 16)), image, valid, net, variables)
    np.testing.assert_allclose(slide, whole, atol=1e-5)


def test_flip_is_the_mean_with_the_mirror_image():
    image, valid = example((10, 14))
    logits = predict(Presentation(flip=True), image, valid)
    for i in range(len(image)):
        mirrored = look(image[i, :, ::-1], valid[i, :, ::-1])[:, ::-1]
        expected = (look(image[i], valid[i]) + mirrored) / 2
        np.testing.assert_allclose(logits[i], expected, rtol=1e-4)


def pillow(array, size):
    """`[h,w,C]` resized by Pillow in float32: bilinear, antialiased."""
    planes = [Image.fromarray(np.float32(plane)) for plane in np.moveaxis(array, -1, 0)]
    resized = [plane.resize(size[::-1], Image.Resampling.BILINEAR) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized], -1)


@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        (Presentation(scales=(0.5, 1.0, 1.75)), [(10, 14), (20, 28), (35, 49)]),
        (Presentation("half_res"), [(10, 14)]),
    ],
)
def test_scales_are_shown_and_averaged_at_the_size_of_the_image(how, sizes):
    image, valid = example((20, 28))
    logits = predict(how, image, np.ones_like(valid))
    for i in range(len(image)):
        seen = [look(pillow(image[i], size), np.ones(size, bool)) for size in sizes]
        expected = np.mean([pillow(each, (20, 28)) for each in seen], 0)
        np.testing.assert_allclose(logits[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(20, 28), (21, 33)])
def test_halved_as_pillow_does(size):
    image, _ = example(size)
    half = (size[0] // 2, size[1] // 2)
    label = np.random.default_rng(1).integers(0, 256, image.shape[:3], np.uint8)
    got = halve({"image": image, "valid": np.ones(image.shape[:3], bool), "label": label})
    assert np.asarray(got["valid"]).all()
    for i in range(len(image)):
        np.testing.assert_allclose(got["image"][i], pillow(image[i], half), rtol=1e-4, atol=1e-3)
        expected = Image.fromarray(label[i]).resize(half[::-1], Image.Resampling.NEAREST)
        np.testing.assert_array_equal(got["label"][i], expected)
    assert got["label"].dtype == np.uint8


@pytest.mark.parametrize(
    "how",
    [
        Presentation("slide", (8, 8), (6, 6), flip=True),
        Presentation("half_res"),
        Presentation(scales=(0.5, 1.5)),
    ],
)
def test_colors_of_the_padding_have_no_influence(how):
    image, valid = example((20, 24))
    other = np.where(valid[..., None], image, 255 - image)
    np.testing.assert_array_equal(*(predict(how, x, valid)[valid] for x in (image, other)))
    batches = [{"image": x, "valid": valid, "label": x[..., 0]} for x in (image, other)]
    first, second = map(halve, batches)
    kept = np.asarray(first["valid"])
    np.testing.assert_array_equal(first["image"][kept], second["image"][kept])


def test_memory_does_not_grow_with_the_number_of_windows():
    image, valid = example((64, 64), images=1)
    needed = [
        jax.jit(make_predict(Context(), Presentation("slide", (16, 16), stride)))
        .lower(NOTHING, image, valid)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for stride in ((16, 16), (1, 1))
    ]
    assert needed[1] < needed[0] + 49 * 49 * 64  # less than a fraction of a window's logits each


TEXTS = {
    "whole": {},
    "slide 512x1024 stride 342x683": {"mode": "slide"},
    "slide 769x769 stride 513x513, flip": {"mode": "slide", "window": (769, 769), "flip": True},
    "slide 8x6 stride 4x2": {"mode": "slide", "window": (8, 6), "stride": (4, 2)},
    "center_crop 513x513": {"mode": "center_crop", "window": [513, 513]},
    "half_res, scales 0.75 1 1.25": {"mode": "half_res", "scales": [0.75, 1, 1.25]},
}


@pytest.mark.parametrize(("text", "changes"), TEXTS.items(), ids=TEXTS.keys())
def test_words(text, changes):
    config = configs.default().eval.to_dict() | changes
    how = Presentation.of(config, (512, 1024))
    assert str(how) == text
    assert how.uncropped.center is None
    assert str(how.uncropped) == text.replace("center_crop 513x513", "whole")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "sliding"}, "There are: whole, slide, center_crop, half_res"),
        ({"mode": "slide", "window": (769,)}, "Give height and width"),
        ({"mode": "center_crop", "window": (0, 5)}, "Give height and width"),
        ({"mode": "whole", "window": (5,)}, "Give height and width"),
        ({"mode": "slide", "window": (8, 8), "stride": (9, 8)}, "at most those of the window"),
        ({"scales": ()}, "holds no factors"),
        ({"scales": (1.0, -1.0)}, "holds no factors"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Presentation.of(configs.default().eval.to_dict() | changes, (512, 1024))


def test_padding_stays_padding():
    image, valid = example((20, 24))
    label = np.where(valid, 1, IGNORE_LABEL).astype(np.uint8)
    half = halve({"image": image, "valid": valid, "label": label})
    np.testing.assert_array_equal(np.asarray(half["label"])[~half["valid"]], IGNORE_LABEL)
