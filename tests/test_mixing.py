import jax
import numpy as np
import pytest

from jaxssl import mixing
from jaxssl.sharding import batched, make_mesh


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


@pytest.fixture(scope="module")
def masks():
    return np.asarray(mixing.box_mask(jax.random.key(0), 4000, (64, 128)))


def test_area_of_three_boxes(masks):
    area = masks.mean((1, 2))
    assert masks.shape == (4000, 64, 128)
    assert masks.dtype == bool
    assert abs(area.mean() - 0.250) < 0.005
    assert abs(area.std() - 0.070) < 0.005


def test_masks_follow_the_reference_law(masks):
    rng = np.random.default_rng(0)
    expected = np.stack([reference_mask(rng, (64, 128), 3, (0.25, 0.5)) for _ in range(4000)])
    q = np.linspace(0, 1, 9)[1:-1]
    np.testing.assert_allclose(
        np.quantile(masks.mean((1, 2)), q), np.quantile(expected.mean((1, 2)), q), atol=0.01
    )
    np.testing.assert_allclose(masks.mean(0), expected.mean(0), atol=0.06)  # six deviations


@pytest.mark.parametrize(("size", "area"), [((64, 128), (0.25, 0.5)), ((100, 60), (0.5, 0.5))])
def test_a_single_box(size, area):
    """A rectangle inside the image, area as asked, with log-uniform aspect."""
    masks = np.asarray(mixing.box_mask(jax.random.key(1), 2000, size, boxes=1, area=area))
    rows, columns = masks.any(2), masks.any(1)
    np.testing.assert_array_equal(masks, rows[:, :, None] & columns[:, None])
    assert (abs(np.diff(rows.astype(int))).sum(1) <= 2).all()
    height, width = rows.mean(1), columns.mean(1)
    share = height * width
    assert share.min() > area[0] - 0.02
    assert share.max() < area[1] + 0.02
    exponent = np.log(height) / np.log(share)
    np.testing.assert_allclose(
        np.quantile(exponent, np.linspace(0, 1, 5)), np.linspace(0, 1, 5), atol=0.05
    )


@pytest.mark.parametrize("boxes", [2, 3])
def test_overlapping_boxes_toggle(boxes):
    """Squares this large all cover the center."""
    mask = mixing.box_mask(jax.random.key(2), 50, (33, 33), boxes=boxes, area=(1.0, 1.0))
    assert (np.asarray(mask)[:, 16, 16] == (boxes % 2 == 1)).all()


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
