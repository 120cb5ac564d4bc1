import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_models import apply, make, random_image

from jaxssl import config as configs
from jaxssl import phases, trained
from jaxssl.contracts import UserError

SIZE = (6, 5)


@pytest.fixture(scope="module")
def mlp():
    net = make(4, name="mlp", hidden=(7, 9))
    return net, net.init(jax.random.key(0), SIZE)


def by_hand(params, image):
    """Logits and features in NumPy."""
    x = ((image - 33.33) / 78.57).reshape(len(image), -1)
    for name in ("layer1", "layer2"):
        layer = params["backbone"][name]
        x = np.maximum(x @ np.asarray(layer["kernel"]) + layer["bias"], 0)
    classifier = params["head"]["classifier"]
    return x @ np.asarray(classifier["kernel"])[0, 0] + classifier["bias"], x


def test_logits_by_hand(mlp):
    net, (params, stats) = mlp
    image = random_image((3, *SIZE))
    logits, features = by_hand(params, image)
    outputs, same = apply(net, batch_stats=True)(params, stats, image)
    assert stats == same == {}
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-5)
    np.testing.assert_allclose(outputs.features, features, atol=1e-5)


def test_the_classifier_multiplies_features(mlp):
    net, variables = mlp
    outputs, _ = apply(net, batch_stats=False)(*variables, random_image((3, *SIZE)))
    kernel, bias = net.classifier(variables.params)
    np.testing.assert_allclose(outputs.logits, outputs.features @ kernel + bias, atol=1e-5)


def test_initial_logits_are_of_the_size_of_the_input():
    """He's kernels keep the variance of white input, whatever the widths."""
    net = make(200, name="mlp", hidden=(600, 300), preprocessing="inception")
    image = 127.5 + 127.5 * jax.random.normal(jax.random.key(1), (20, 16, 16, 3))
    outputs, _ = net.apply(*net.init(jax.random.key(0), (16, 16)), image, batch_stats=False)
    assert (outputs.features**2).mean() == pytest.approx(1, rel=0.2)
    assert (outputs.logits**2).mean() == pytest.approx(1 / 3, rel=0.2)


def test_dropout_is_behind_both_hidden_layers():
    net = make(4, name="mlp", hidden=(400, 300), dropout=0.25)
    params, stats = net.init(jax.random.key(0), SIZE)
    ones = jax.tree.map(jnp.ones_like, params["backbone"])
    image = np.full((1, *SIZE, 3), 150.0)
    run = functools.partial(net.apply, {**params, "backbone": ones}, stats, image, batch_stats=True)
    plain, noisy = run()[0].features, run(key=jax.random.key(1))[0].features
    assert (noisy == 0).mean() == pytest.approx(0.25, abs=0.08)
    # All units are alike, so each is the sum over those of the layer before that were kept.
    kept = (noisy.max() * 0.75 - 1) * 0.75 / (plain.max() - 1)
    assert kept == pytest.approx(0.75, abs=0.06)
    assert kept * 400 == pytest.approx(round(float(kept * 400)), abs=0.01)


def test_one_size_alone(mlp):
    net, variables = mlp
    with pytest.raises(UserError, match=r"for images of 30 pixels cannot see one of 35: it takes"):
        net.apply(*variables, np.zeros((1, 7, 5, 3)), batch_stats=False)


@pytest.mark.parametrize("hidden", [(), (5, 0)])
def test_refuses(hidden):
    with pytest.raises(UserError, match=r"model\.hidden is .* such as \(256,\)"):
        make(name="mlp", hidden=hidden)


@pytest.mark.slow
def test_no_statistics_pass_through_pmap_checkpoints_and_a_resumed_run(tmp_path):
    config = configs.default()
    configs.use_network(config, "mlp", hidden=(8,), dropout=0.5)
    with config.unlocked():
        config.data.update(name="digits", root="", split="1_8")
    config.update(crop=(8, 8), steps=2, warmup=2, distributed="off", parallel="pmap")
    config.batch.update(labeled=8, unlabeled=8)
    config.augment.update(scale=(1.0, 1.0), flip=False)
    config.method = ConfigDict({"name": "mean_teacher", "teacher_stats": "ema"})
    config.log.update(every=1, tensorboard=False)
    config.eval.update(every=2, batch=360, panels=0)
    config.checkpoint.every = 2

    def trained_weights():
        assert phases.run(config, tmp_path) == 0
        run = trained.open_trained(tmp_path)
        return {name: run.variables(name, 4) for name in run.networks}

    first = trained_weights()
    assert {name: variables.stats for name, variables in first.items()} == {
        "a": {},
        "teacher_a": {},
    }
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    jax.tree.map(np.testing.assert_array_equal, first, trained_weights())
