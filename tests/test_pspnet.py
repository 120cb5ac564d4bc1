import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import apply, make, random_image, random_network

from jaxssl.contracts import UserError

SMALL = {
    "name": "pspnet",
    "num_classes": 5,
    "backbone": "resnet10",
    "width": 8,
    "stem_width": 4,
    "channels": 16,
    "auxiliary_channels": 12,
}


def test_classifier_multiplies_features():
    net, variables, _ = random_network(SMALL)
    outputs, _ = apply(net, batch_stats=False)(*variables, random_image((1, 33, 41)))
    kernel, bias = net.classifier(variables.params)
    assert outputs.features.shape == (1, 5, 6, 16)
    np.testing.assert_allclose(outputs.logits, outputs.features @ kernel + bias, atol=1e-5)
    assert outputs.auxiliary is None


@pytest.mark.parametrize("bins", [(), (0, 2)])
def test_refuses_a_pyramid_without_windows(bins):
    with pytest.raises(UserError, match=r"model\.pool_bins is .* positive"):
        make(name="pspnet", pool_bins=bins)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_outputs_are_wide(dtype):
    with jax.enable_x64(dtype == "float64"):
        net = make(**SMALL, dtype=dtype)
        variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (33, 33)))
        run = functools.partial(net.apply, batch_stats=True)
        image = jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.uint8)
        outputs, stats = jax.eval_shape(run, *variables, image)
        wide = jnp.dtype("float64" if dtype == "float64" else "float32")
        assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs, stats))} == {wide}


def test_noise_is_published():
    """Dropout acts by default, in both heads."""
    net = make(**SMALL)
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (33, 33)))

    def draws(key):
        run = functools.partial(net.apply, batch_stats=True, key=key)
        return str(jax.make_jaxpr(run)(*variables, random_image((2, 33, 33)))).count("random_bits")

    assert draws(None) == 0
    assert draws(jax.random.key(0)) == 2


@pytest.mark.parametrize(("backbone", "depth"), [("resnet50", 2048), ("efficientnet_lite0", 320)])
def test_full_size(backbone, depth):
    net = make(name="pspnet", backbone=backbone)
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (361, 361)))
    head = variables.params["head"]
    assert head["pool4"]["conv"]["kernel"].shape == (1, 1, depth, depth // 4)
    assert head["bottleneck"]["conv"]["kernel"].shape == (3, 3, 2 * depth, 512)
    image = jax.ShapeDtypeStruct((8, 361, 361, 3), jnp.uint8)
    outputs, _ = jax.eval_shape(functools.partial(net.apply, batch_stats=True), *variables, image)
    assert outputs.logits.shape == outputs.auxiliary.shape == (8, 46, 46, 19)
    assert outputs.features.shape == (8, 46, 46, 512)


@pytest.fixture(scope="module")
def twins():
    pytest.importorskip("torch")
    import torch_twin

    return torch_twin


def twin_of(twins, fields):
    return twins.PSPNet(**{key: value for key, value in fields.items() if key != "name"})


@pytest.mark.torch
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"align_corners": True}, (33, 41)),  # fewer features than windows
        ({"align_corners": False}, (33, 41)),
        ({"width": 16, "pool_bins": (1, 2, 4), "num_classes": 19}, (64, 96)),
        ({"backbone": "resnet18", "align_corners": True}, (50, 70)),
        ({"backbone": "resnet50", "stem_width": 8, "align_corners": True}, (97, 65)),
    ],
)
def test_logits_equal_pytorch(twins, fields, size):
    net, variables, leaves = random_network(SMALL | fields)
    image = random_image((1, *size))
    expected, _ = twins.run(twin_of(twins, SMALL | fields), leaves, image)
    assert np.std(expected.numpy()) > 0.5
    logits = apply(net, batch_stats=False)(*variables, image)[0].logits
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.torch
def test_training_equals_pytorch(twins):
    fields = SMALL | {"align_corners": True}
    _, variables, leaves = random_network(fields)
    image = random_image((2, 49, 81)).astype(np.float64)
    logits, auxiliary = twins.run(twin_of(twins, fields), leaves, image, training=True)
    with jax.enable_x64(True):
        net = make(**fields, dtype="float64")
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
        outputs, _ = apply(net, batch_stats=True)(*wide, image)
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-9)
    np.testing.assert_allclose(outputs.auxiliary, auxiliary, atol=1e-9)


@pytest.mark.torch
def test_parameter_counts_equal_pytorch(twins):
    with twins.torch.device("meta"):
        twin = twins.PSPNet(num_classes=19)
    variables = jax.eval_shape(lambda: make(name="pspnet").init(jax.random.key(0), (65, 65)))
    expected = sum(p.numel() for p in twin.parameters())
    assert sum(x.size for x in jax.tree.leaves(variables.params)) == expected
