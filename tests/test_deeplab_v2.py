import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import apply, convolved, jit, make, random_image, random_network

from jaxssl.contracts import UserError

SMALL = {
    "name": "deeplab_v2",
    "num_classes": 5,
    "backbone": "resnet10",
    "width": 8,
    "auxiliary": True,
    "auxiliary_channels": 12,
}
NEAR = {"aspp_rates": (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def small():
    return random_network(SMALL | NEAR)


@pytest.fixture(scope="module")
def image():
    return random_image((1, 33, 41))


@pytest.fixture(scope="module")
def evaluated(small, image):
    net, variables, _ = small
    return apply(net, batch_stats=False)(*variables, image)[0]


@pytest.mark.parametrize("branches", [4, 2])
def test_logits_are_a_sum_of_atrous_convolutions(small, image, branches):
    _, variables, _ = small
    head = {f"aspp{i}": variables.params["head"][f"aspp{i}"] for i in range(1, branches + 1)}
    net = make(**SMALL, **NEAR, aspp_branches=branches)
    outputs, _ = apply(net, batch_stats=False)(
        {**variables.params, "head": head}, variables.stats, image
    )
    assert outputs.features.shape == (1, 5, 6, 64)
    features = np.asarray(outputs.features, np.float64)
    parts = [
        convolved(features, np.asarray(branch["kernel"]), 1, rate, 1) + branch["bias"]
        for rate, branch in enumerate(head.values(), 1)
    ]
    np.testing.assert_allclose(outputs.logits, np.sum(parts, 0), atol=1e-4)
    assert outputs.auxiliary is None


def test_dropout_takes_channels_of_the_features(small, evaluated, image):
    _, variables, _ = small
    dropping = apply(make(**SMALL, **NEAR, dropout=0.5), batch_stats=False)
    kept, _ = dropping(*variables, image, key=jax.random.key(0))
    plain, kept = np.asarray(evaluated.features), np.asarray(kept.features)
    dropped = (kept == 0).all((0, 1, 2))
    np.testing.assert_allclose(kept, np.where(dropped, 0, 2 * plain), rtol=1e-6)
    assert 0.25 < dropped[plain.any((0, 1, 2))].mean() < 0.75


def test_no_classifier(small):
    net, variables, _ = small
    with pytest.raises(UserError, match=r"jaxssl\.models\.deeplab_v2 does not end in one 1x1"):
        net.classifier(variables.params)


def test_init():
    params, _ = make(**SMALL, **NEAR).init(jax.random.key(0), (33, 33))
    assert sorted(params["head"]) == ["aspp1", "aspp2", "aspp3", "aspp4"]
    for branch in params["head"].values():
        assert np.std(branch["kernel"]) == pytest.approx(0.01, rel=0.1)
        np.testing.assert_array_equal(branch["bias"], 0)


@pytest.mark.parametrize("branches", [0, 5])
def test_refuses_branches_without_rates(branches):
    with pytest.raises(UserError, match=r"model\.aspp_branches is .* from 1 to 4"):
        make(name="deeplab_v2", aspp_branches=branches)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_outputs_are_wide(dtype):
    with jax.enable_x64(dtype == "float64"):
        net = make(**SMALL, dtype=dtype)
        variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (33, 33)))
        run = functools.partial(net.apply, batch_stats=True)
        outputs, stats = jax.eval_shape(
            run, *variables, jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.uint8)
        )
        wide = jnp.dtype("float64" if dtype == "float64" else "float32")
        assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs, stats))} == {wide}


def test_full_size():
    net = make(21, name="deeplab_v2")
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (321, 321)))
    head = sum(x.size for x in jax.tree.leaves(variables.params["head"]))
    assert head == 4 * 21 * (9 * 2048 + 1)
    image = jax.ShapeDtypeStruct((8, 321, 321, 3), jnp.uint8)
    outputs, _ = jax.eval_shape(functools.partial(net.apply, batch_stats=True), *variables, image)
    assert outputs.logits.shape == (8, 41, 41, 21)
    assert outputs.features.shape == (8, 41, 41, 2048)
    assert outputs.auxiliary is None


@pytest.fixture(scope="module")
def twins():
    pytest.importorskip("torch")
    import torch_twin

    return torch_twin


def resized(twins, logits, size, align_corners):
    logits = logits.permute(0, 3, 1, 2)
    resize = twins.F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    return resize.permute(0, 2, 3, 1)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("fields", "size", "align_corners"),
    [
        ({"backbone": "resnet10", "width": 16, **NEAR}, (64, 96), True),
        ({"backbone": "resnet18", "width": 16, "aspp_branches": 2}, (65, 97), False),
        ({"backbone": "resnet50", "width": 8}, (49, 81), True),
        ({"backbone": "resnet10", "stem": "deep", "output_stride": 16}, (50, 70), False),
    ],
)
def test_logits_equal_pytorch(twins, fields, size, align_corners):
    net, variables, leaves = random_network(
        {"name": "deeplab_v2", "align_corners": align_corners, **fields}
    )
    image = random_image((1, *size))
    logits, _ = twins.run(twins.DeepLabV2(num_classes=19, **fields), leaves, image)
    assert np.std(logits.numpy()) > 0.5
    expected = twins.F.interpolate(
        logits.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=align_corners
    )

    def run(params, stats, image):
        outputs, _ = net.apply(params, stats, image, batch_stats=False)
        return outputs.logits, net.resize(outputs.logits, size)

    small, large = jit(run)(*variables, image)
    np.testing.assert_allclose(small, logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(large, expected.permute(0, 2, 3, 1), atol=1e-4, rtol=0)


@pytest.mark.torch
def test_training_equals_pytorch(twins, small):
    _, variables, leaves = small
    image = random_image((2, 49, 81)).astype(np.float64)
    fields = {key: value for key, value in (SMALL | NEAR).items() if key != "name"}
    logits, auxiliary = twins.run(twins.DeepLabV2(**fields), leaves, image, training=True)
    with jax.enable_x64(True):
        net = make(**SMALL, **NEAR, dtype="float64")
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
        outputs, _ = apply(net, batch_stats=True)(*wide, image)
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-9)
    np.testing.assert_allclose(outputs.auxiliary, auxiliary, atol=1e-9)


@pytest.mark.torch
def test_parameter_counts_equal_pytorch(twins):
    with twins.torch.device("meta"):
        twin = twins.DeepLabV2(num_classes=21)
    net = make(21, name="deeplab_v2", backbone="resnet101")
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (65, 65)))
    expected = sum(p.numel() for p in twin.parameters())
    assert sum(x.size for x in jax.tree.leaves(variables.params)) == expected
