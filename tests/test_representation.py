"""The representation head that networks may have beside the classifier."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMIZER
from test_models import apply, jit, make, path_of, random_image, random_network

from jaxssl import optim
from jaxssl.contracts import UserError
from jaxssl.models import layers

U2PL = {
    "num_classes": 5,
    "backbone": "resnet10",
    "width": 8,
    "stem_width": 8,
    "output_stride": 8,
    "multi_grid": (2, 2, 4),
    "aspp_rates": (12, 24, 36),
    "channels": 16,
    "low_level_channels": 16,
    "embedding": 12,
}
OURS = U2PL | {"separable": False, "align_corners": True}
NETWORKS = {
    "deeplab_v3plus": (OURS, 4),
    "deeplab_v2": ({"num_classes": 5, "backbone": "resnet10", "width": 8, "embedding": 12}, 8),
    "pspnet": ({"num_classes": 5, "backbone": "resnet10", "width": 8, "embedding": 12}, 8),
}


@pytest.fixture(scope="module")
def net():
    return random_network(OURS)


@pytest.fixture(scope="module")
def twins():
    pytest.importorskip("torch")
    import torch_twin

    return torch_twin


@pytest.mark.torch
def test_logits_and_embedding_equal_pytorch(twins, net):
    network, variables, leaves = net
    image = random_image((2, 49, 81))
    logits, embedding = twins.run(twins.U2PL(**U2PL), leaves, image)
    outputs, _ = apply(network, batch_stats=False)(*variables, image)
    assert min(logits.std(), embedding.std()) > 0.3
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-4)
    np.testing.assert_allclose(outputs.embedding, embedding, atol=1e-4)


@pytest.mark.torch
def test_gradients_equal_pytorch(twins, net):
    image = random_image((2, 33, 49)).astype(np.float64)

    def objective(logits, embedding):
        return (logits**2).mean() + (embedding**2).mean()

    with jax.enable_x64(True):
        network = make(**OURS, dtype="float64")
        params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), net[1])

        def loss(params):
            outputs, _ = network.apply(params, stats, image, batch_stats=True)
            return objective(outputs.logits, outputs.embedding)

        grads = jit(jax.grad(loss))(params)
    twin = twins.U2PL(**U2PL).double().train()
    twins.load(twin, net[2])
    objective(*twin(twins.torch.from_numpy(image))).backward()
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name, ours = twins.name_and_tensor(path_of(keys), leaf)
        np.testing.assert_allclose(ours, theirs.pop(name), atol=1e-8, rtol=1e-7, err_msg=name)
    assert not theirs


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_network_may_have_one(name, dtype):
    fields, stride = NETWORKS[name]
    network = make(name=name, **fields, dtype=dtype)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), (48, 80)))
    image = jax.ShapeDtypeStruct((2, 48, 80, 3), jnp.uint8)
    for batch_stats in (True, False):
        run = functools.partial(network.apply, batch_stats=batch_stats)
        outputs, _ = jax.eval_shape(run, *variables, image)
        assert outputs.embedding.shape == (2, 48 // stride, 80 // stride, 12)
        assert outputs.embedding.dtype == jnp.float32
    plain = make(name=name, **fields | {"embedding": 0})
    without = jax.eval_shape(lambda: plain.init(jax.random.key(0), (48, 80)))
    assert variables.params["head"].keys() - without.params["head"].keys() == {"representation"}
    run = functools.partial(plain.apply, batch_stats=False)
    assert jax.eval_shape(run, *without, image)[0].embedding is None


def test_a_separable_decoder_has_a_separable_representation():
    network = make(**OURS | {"separable": True})
    params, _ = jax.eval_shape(lambda: network.init(jax.random.key(0), (33, 33)))
    assert params["head"]["representation"]["conv1"].keys() == {"depthwise", "pointwise"}


def test_dropout_follows_every_3x3_convolution():
    network, key, rates = make(**OURS, dropout=0.2, decoder_dropout=0.1), jax.random.key(0), []

    def record(call, arguments, named, context):
        if isinstance(context.module, layers.Dropout) and context.module.path[0] == "head":
            rates.append(context.module.rate)
        return call(*arguments, **named)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: network.init(key, (33, 33)))
    assert sorted(rates) == [0.1, 0.1, 0.1, 0.1, 0.2]


def test_it_learns_at_the_heads_rate(net):
    _, (params, _), _ = net
    optimizer = optim.make_optimizer(OPTIMIZER | {"head_factor": 10.0})
    ones = jax.tree.map(jnp.ones_like, params)
    direction, _ = optimizer.update(ones, optimizer.init(params), params)
    np.testing.assert_allclose(direction["head"]["representation"]["projection"]["bias"], 10.0)


@pytest.mark.parametrize(("field", "value"), [("embedding", -1), ("decoder_dropout", 1.0)])
def test_refuses(field, value):
    with pytest.raises(UserError, match=rf"model\.{field} is .*; it must be"):
        make(**{field: value})
