import functools

import jax
import numpy as np
import pytest
from test_models import (
    apply,
    assert_same_update,
    jit,
    make,
    random_image,
    random_network,
)

from jaxssl.contracts import UserError

SMALL = {"name": "wide_resnet", "num_classes": 10, "depth": 10, "widen": 1}


@pytest.fixture(scope="module")
def twins():
    pytest.importorskip("torch")
    import torch_twin

    return torch_twin


def shapes_of(net, size=(32, 32)):
    return jax.eval_shape(lambda: net.init(jax.random.key(0), size))


def test_size_is_the_published_one():
    params = shapes_of(make(10, name="wide_resnet")).params
    assert sum(x.size for x in jax.tree.leaves(params)) == 1467610


def test_stages_halve_the_image_twice():
    net = make(10, name="wide_resnet")
    variables, image = shapes_of(net), jax.ShapeDtypeStruct((4, 32, 40, 3), np.uint8)
    backbone = net.module(batch_stats=False).backbone
    stages = jax.eval_shape(
        lambda v, x: backbone.apply(
            {"params": v.params["backbone"], "batch_stats": v.stats["backbone"]}, x / 1.0
        ),
        variables,
        image,
    )
    assert [x.shape for x in stages] == [(4, 32, 40, 32), (4, 16, 20, 64), (4, 8, 10, 128)]
    outputs, _ = jax.eval_shape(functools.partial(net.apply, batch_stats=False), *variables, image)
    assert (outputs.logits.shape, outputs.features.shape) == ((4, 10), (4, 128))


def test_init():
    params, _ = make(**SMALL | {"widen": 2}).init(jax.random.key(0), (32, 32))
    conv = params["backbone"]["layer3_0"]["conv2"]["kernel"]
    assert np.std(conv) == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)
    classifier = params["head"]["classifier"]["kernel"]
    assert np.std(classifier) == pytest.approx(1 / np.sqrt(3 * 128), rel=0.1)


def test_colors_are_those_of_dmt():
    net = make(name="wide_resnet")
    np.testing.assert_array_equal(
        np.round(np.array(net.mean) / 255, 5), [0.49137, 0.48235, 0.44667]
    )
    np.testing.assert_array_equal(np.round(np.array(net.std) / 255, 5), [0.24706, 0.24353, 0.26157])


@pytest.mark.parametrize("depth", [4, 9, 27, 29])
def test_refuses_depths_between(depth):
    with pytest.raises(UserError, match=r"model\.depth is .* 4 more than a multiple of 6"):
        make(name="wide_resnet", depth=depth)


@pytest.mark.torch
@pytest.mark.parametrize("fields", [{"depth": 28, "widen": 2}, {}])
def test_logits_equal_pytorch(twins, fields):
    net, variables, leaves = random_network(SMALL | fields)
    twin = twins.WideResNet(10, net.depth, net.widen)
    image = random_image((3, 32, 32))
    expected = twins.run(twin, leaves, image)
    logits = apply(net, batch_stats=False)(*variables, image)[0].logits
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.torch
def test_training_equals_pytorch(twins):
    _, variables, leaves = random_network(SMALL | {"widen": 2})
    image = random_image((2, 32, 32))
    twin = twins.WideResNet(10, 10, 2).double().train()
    twins.load(twin, leaves)
    counts = twins.count_normalized(twin)
    (twin(twins.torch.from_numpy(image).double()) ** 2).mean().backward()
    with jax.enable_x64(True):
        net = make(**SMALL | {"widen": 2}, dtype="float64")
        params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)

        def loss(params):
            outputs, new_stats = net.apply(params, stats, image, batch_stats=True)
            return (outputs.logits**2).mean(), new_stats

        grads, new_stats = jit(jax.grad(loss, has_aux=True))(params)
    assert_same_update(twins, twin, counts, leaves, grads, new_stats)
