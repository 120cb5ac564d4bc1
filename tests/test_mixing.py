import collections
import functools

import jax
import numpy as np
import pytest
from scipy import ndimage, stats

from jaxssl import mixing
from jaxssl.sharding import batched, make_mesh


def box_mask(seed, *args, **settings):
    """Compiled, where three boxes of thousands of masks need no memory of their own."""
    draw = functools.partial(mixing.box_mask, **settings)
    return np.asarray(jax.jit(draw, static_argnums=(1, 2))(jax.random.key(seed), *args))


def reference_mask(rng, size, boxes, area):
    """One mask by the generator of French et al., written from its definition."""
    mask = np.zeros(size, bool)
    for _ in range(boxes):
        share = rng.uniform(*area)
        height = np.exp(rng.uniform() * np.log(share))
        width = share / height
        h, w = (round(s * n / np.sqrt(boxes)) for s, n in zip((height, width), size, strict=True))
        top, left = round((size[0] - h) * rng.uniform()), round((size[1] - w) * rng.uniform())
        mask[top : top + h, left : left + w] ^= True
    return mask


def separate_boxes(masks):
    """Heights and widths `[n,2]` of all boxes, where a mask shows three that do not touch."""
    sizes = []
    for mask in masks:
        parts, count = ndimage.label(mask)
        found = [part for part in ndimage.find_objects(parts) if mask[part].all()]
        if count == len(found) == 3:
            sizes += [[s.stop - s.start for s in part] for part in found]
    return np.array(sizes)


@pytest.fixture(scope="module")
def masks():
    return box_mask(0, 4000, (64, 128))


@pytest.fixture(scope="module")
def expected():
    """As many masks by the reference."""
    rng = np.random.default_rng(0)
    return np.stack([reference_mask(rng, (64, 128), 3, (0.25, 0.5)) for _ in range(4000)])


def test_area_of_three_boxes(masks):
    """Within four standard errors."""
    area = masks.mean((1, 2))
    assert masks.shape == (4000, 64, 128)
    assert masks.dtype == bool
    assert abs(area.mean() - 0.250) < 0.005
    assert abs(area.std() - 0.070) < 0.005


def test_masks_follow_the_reference_law(masks, expected):
    q = np.linspace(0, 1, 9)[1:-1]
    np.testing.assert_allclose(
        np.quantile(masks.mean((1, 2)), q), np.quantile(expected.mean((1, 2)), q), atol=0.01
    )
    np.testing.assert_allclose(masks.mean(0), expected.mean(0), atol=0.06)  # six deviations


def test_each_of_three_boxes(masks, expected):
    """Where overlaps leave three rectangles they are no boxes, in about one mask of 30."""
    boxes, others = separate_boxes(masks), separate_boxes(expected)
    share, rounding = boxes.prod(1) / (64 * 128), 0.51 * boxes[:, 1] / (64 * 128)
    assert (share <= 0.5 / 3 + rounding).all()
    assert (share >= 0.25 / 3 - rounding).mean() > 0.93
    q = np.linspace(0, 1, 9)[1:-1]
    aspect, reference = (np.log(sizes[:, 0] / sizes[:, 1]) for sizes in (boxes, others))
    np.testing.assert_allclose(np.quantile(aspect, q), np.quantile(reference, q), atol=0.2)
    np.testing.assert_allclose(
        np.quantile(share, q), np.quantile(others.prod(1) / (64 * 128), q), rtol=0.1
    )


@pytest.mark.parametrize(("size", "area"), [((64, 128), (0.25, 0.5)), ((100, 60), (0.5, 0.5))])
def test_a_single_box(size, area):
    """A rectangle of the area asked for, log-uniform in aspect, anywhere inside the image."""
    masks = box_mask(1, 2000, size, boxes=1, area=area)
    rows, columns = masks.any(2), masks.any(1)
    np.testing.assert_array_equal(masks, rows[:, :, None] & columns[:, None])
    assert (abs(np.diff(rows.astype(int))).sum(1) <= 2).all()
    height, width = rows.mean(1), columns.mean(1)
    share, evenly = height * width, np.linspace(0, 1, 5)
    np.testing.assert_allclose(np.quantile(share, evenly), np.quantile(area, evenly), atol=0.02)
    exponent = np.log(height) / np.log(share)
    np.testing.assert_allclose(np.quantile(exponent, evenly), evenly, atol=0.05)
    for sides in (rows, columns):
        room = sides.shape[1] - sides.sum(1)
        place = sides.argmax(1)[room > 10] / room[room > 10]
        np.testing.assert_allclose(np.quantile(place, evenly), evenly, atol=0.06)


@pytest.mark.parametrize(
    ("size", "share"),
    [
        ((64, 128), 0.5),
        ((65, 33), 0.5),
        ((5, 200), 0.5),
        ((10, 1), 0.5),
        ((2, 2), 0.5),
        ((64, 9), 0.25),  # a box of the full height would be 2.25 wide
    ],
)
def test_the_area_of_a_box_is_exact(size, share):
    """As near as whole pixels allow: within half a row of the box."""
    masks = box_mask(7, 2000, size, boxes=1, area=(share, share))
    pixels, width = masks.sum((1, 2)), masks.any(1).sum(1)
    assert (abs(pixels - share * size[0] * size[1]) <= width / 2).all()


@pytest.mark.parametrize("boxes", [2, 3])
def test_overlapping_boxes_toggle(boxes):
    """Squares this large all cover the center."""
    mask = box_mask(2, 50, (33, 33), boxes=boxes, area=(1.0, 1.0))
    assert (mask[:, 16, 16] == (boxes % 2 == 1)).all()


@pytest.mark.parametrize(("size", "side", "length"), [((8, 12), 0.5, 4), ((9, 5), 1.0, 4)])
def test_cutout_takes_a_square_around_any_pixel(size, side, length):
    """All masks that the definition gives, and each center as often: within four deviations."""
    draw = jax.jit(mixing.cutout_mask, static_argnums=(1, 2), static_argnames="side")
    masks = np.asarray(draw(jax.random.key(0), 4000, size, side=side))
    centers = {}
    for y, x in np.ndindex(size):
        mask = np.zeros(size, bool)
        mask[
            max(0, y - length // 2) : y + length // 2, max(0, x - length // 2) : x + length // 2
        ] = 1
        centers.setdefault(mask.tobytes(), []).append((y, x))
    counts = collections.Counter(mask.tobytes() for mask in masks)
    assert counts.keys() == centers.keys()
    for mask, places in centers.items():
        expected = 4000 * len(places) / np.prod(size)
        assert abs(counts[mask] - expected) < 4 * expected**0.5


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int32])
@pytest.mark.parametrize("depth", [(), (3,)])
def test_mix_keeps_own_and_takes_next(depth, dtype):
    rng = np.random.default_rng(3)
    x = rng.integers(0, 200, (4, 6, 8, *depth)).astype(dtype)
    mask = rng.random((4, 6, 8)) < 0.5
    mixed = np.asarray(jax.jit(mixing.mix)(mask, x))
    assert mixed.dtype == dtype
    for i in range(4):
        np.testing.assert_array_equal(mixed[i][mask[i]], x[i][mask[i]])
        np.testing.assert_array_equal(mixed[i][~mask[i]], x[(i + 1) % 4][~mask[i]])


def test_mix_with_a_partner():
    x, partner = np.zeros((2, 3, 4)), np.ones((2, 3, 4))
    mask = np.random.default_rng(4).random((2, 3, 4)) < 0.5
    np.testing.assert_array_equal(mixing.mix(mask, x, partner=partner), ~mask)


def test_mix_across_devices():
    mesh = make_mesh()
    rng = np.random.default_rng(5)
    x, mask = rng.random((8, 4, 6, 3), np.float32), rng.random((8, 4, 6)) < 0.5
    split = jax.device_put((mask, x), batched(mesh))
    np.testing.assert_array_equal(
        jax.jit(mixing.mix)(*split), np.where(mask[..., None], x, x[[1, 2, 3, 4, 5, 6, 7, 0]])
    )


@pytest.mark.parametrize("alpha", [0.2, 0.75, 4.0])
def test_mixup_draws_the_greater_part(alpha):
    keys = jax.random.split(jax.random.key(0), 4000)
    shares = jax.vmap(lambda key: mixing.mixup(key, 3, alpha=alpha).share)(keys)
    drawn = np.random.default_rng(0).beta(alpha, alpha, 4000)
    assert stats.ks_2samp(np.asarray(shares), np.maximum(drawn, 1 - drawn)).pvalue > 1e-3


def test_mixup_pairs_at_random():
    found = [mixing.mixup(jax.random.key(seed), 5).partner for seed in range(50)]
    assert all(sorted(partner.tolist()) == [0, 1, 2, 3, 4] for partner in found)
    assert len({tuple(partner.tolist()) for partner in found}) > 30


@pytest.mark.parametrize(("depth", "dtype"), [((), np.float32), ((4, 5, 3), np.uint8)])
def test_mixup_is_the_mean_of_an_image_and_its_partner(depth, dtype):
    x = np.random.default_rng(6).integers(0, 256, (6, *depth)).astype(dtype)
    mixed = mixing.mixup(jax.random.key(6), 6)
    share, partner = float(mixed.share), np.asarray(mixed.partner)
    assert mixed(x).dtype == np.float32
    expected = [share * x[i] + (1 - share) * x[partner[i]] for i in range(6)]
    np.testing.assert_allclose(mixed(x), expected, rtol=1e-6)


def test_mixup_without_alpha_leaves_everything():
    x = np.random.default_rng(7).random((6, 4), np.float32)
    np.testing.assert_array_equal(mixing.mixup(jax.random.key(7), 6, alpha=0.0)(x), x)


def test_mixup_across_devices():
    x, key = np.random.default_rng(8).random((8, 4), np.float32), jax.random.key(8)
    mix = jax.jit(lambda x: mixing.mixup(key, 8)(x))
    np.testing.assert_allclose(mix(jax.device_put(x, batched(make_mesh()))), mix(x), rtol=1e-6)


def test_resize_nearest_by_hand():
    mask = np.arange(8)[None, :, None] * 10 + np.arange(5)[None, None]
    np.testing.assert_array_equal(mixing.resize_nearest(mask, (2, 3))[0], [[0, 1, 3], [40, 41, 43]])
    np.testing.assert_array_equal(mixing.resize_nearest(mask, (8, 5)), mask)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(128, 256), (129, 257), (65, 33), (512, 1024), (600, 100)])
def test_resize_nearest_is_torchs_nearest(size):
    torch = pytest.importorskip("torch")
    labels = np.random.default_rng(6).integers(0, 256, (2, 512, 769), np.uint8)
    expected = torch.nn.functional.interpolate(torch.tensor(labels)[:, None], size=size)[:, 0]
    np.testing.assert_array_equal(mixing.resize_nearest(labels, size), expected)
