import dataclasses
import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import apply, make, path_of, random_image, random_network

from jaxssl import config as configs
from jaxssl import models, optim
from jaxssl.contracts import UserError
from jaxssl.models import backbones, classification, pretrained, pth, segmentation

SMALL = {"name": "classifier", "num_classes": 5, "backbone": "resnet10", "width": 8}
WHOLE = ("classifier", "mlp", "wide_resnet")


def shapes_of(net, size=(32, 32)):
    return jax.eval_shape(lambda: net.init(jax.random.key(0), size))


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    # torchvision's counts, and that of EfficientNet-Lite0's paper in full
    [("resnet18", 11689512), ("resnet50", 25557032), ("efficientnet_lite0", 4652008)],
)
def test_full_size(backbone, parameters):
    net = make(1000, name="classifier", backbone=backbone)
    variables = shapes_of(net, (224, 224))
    assert sum(x.size for x in jax.tree.leaves(variables.params)) == parameters
    image = jax.ShapeDtypeStruct((4, 224, 200, 3), jnp.uint8)
    outputs, _ = jax.eval_shape(functools.partial(net.apply, batch_stats=True), *variables, image)
    assert outputs.logits.shape == (4, 1000)
    assert outputs.features.shape == (4, variables.params["head"]["classifier"]["kernel"].shape[2])


def test_the_mean_weighs_places_by_what_they_see():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 2, 4)).astype(np.float32)
    valid = np.zeros((2, 12, 8), bool)
    valid[0, :6, :5] = True  # a place sees 4x4 pixels
    valid[1] = True
    weight = np.array([[16, 4], [8, 2], [0, 0]])[..., None]
    expected = [(weight * x[0]).sum((0, 1)) / 30, x[1].mean((0, 1))]
    np.testing.assert_allclose(classification.average(x, valid), expected, atol=1e-6)
    np.testing.assert_allclose(classification.average(x), x.mean((1, 2)), atol=1e-6)


def test_an_image_without_valid_pixels_gives_numbers_and_gradients():
    x, valid = jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 8, 8), bool)
    value, gradient = jax.value_and_grad(lambda x: classification.average(x, valid).sum())(x)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_padding_does_not_dilute_an_image():
    net, variables, _ = random_network(SMALL)
    run = apply(net, batch_stats=False)
    image = np.full((1, 64, 64, 3), 200, np.uint8)
    padded = np.pad(image, ((0, 0), (0, 64), (0, 64), (0, 0)))
    valid = np.pad(np.ones((1, 64, 64), bool), ((0, 0), (0, 64), (0, 64)))
    alone, wide, blind = (
        run(*variables, x, valid=seen)[0].features
        for x, seen in ((image, None), (padded, valid), (padded, None))
    )
    assert np.abs(wide - alone).mean() < 0.5 * np.abs(blind - alone).mean()


@pytest.fixture(scope="module")
def twins():
    pytest.importorskip("torch")
    import torch_twin

    return torch_twin


@pytest.mark.torch
@pytest.mark.parametrize(
    "fields",
    [{}, {"backbone": "resnet50"}, {"backbone": "resnet18", "stem": "deep", "output_stride": 16}],
)
def test_logits_equal_pytorch(twins, fields):
    net, variables, leaves = random_network(SMALL | fields)
    body = twins.ResNet(net.backbone, 8, net.stem, None, net.output_stride, None)
    linear = twins.nn.Conv2d(64 * body.block.expansion, 5, 1)
    twin = twins.nn.ModuleDict(
        {"backbone": body, "head": twins.nn.ModuleDict({"classifier": linear})}
    ).eval()
    twins.load(twin, leaves)
    image = random_image((2, 65, 81))
    mean, std = (np.float32(color) for color in (net.mean, net.std))
    with twins.torch.no_grad():
        x = twins.torch.from_numpy((image - mean) / std).permute(0, 3, 1, 2)
        features = body(x)[-1].mean((2, 3))
        expected = linear(features[:, :, None, None]).flatten(1)
    outputs, _ = apply(net, batch_stats=False)(*variables, image)
    assert expected.std() > 0.5
    np.testing.assert_allclose(outputs.features, features, atol=1e-4)
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", WHOLE)
def test_they_have_no_key_of_segmentation(name):
    fields = {field.name for field in dataclasses.fields(segmentation.ConvolutionalNetwork)}
    shared = {field.name for field in dataclasses.fields(backbones.ConvolutionalNetwork)}
    config = configs.default()
    configs.use_network(config, name)
    strange = (fields - shared) | {"align_corners", "multi_grid", "dilate_first"}
    assert strange.isdisjoint(config.model)
    models.load(config.model, 2)


@pytest.mark.parametrize("name", WHOLE)
def test_the_head_learns_at_its_own_rate_and_kernels_alone_decay(name):
    config = configs.default()
    configs.use_network(config, name)
    configs.use_small(config)
    net = models.load(config.model, 3)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes_of(net).params)
    assert sorted(params) == ["backbone", "head"]
    config.optimizer.update(
        name="sgd", weight_decay=0.5, head_factor=10.0, decay_norm_and_bias=False
    )
    optimizer = optim.make_optimizer(config.optimizer)
    gradient = jax.tree.map(jnp.zeros_like, params)
    direction, _ = optimizer.update(gradient, optimizer.init(params), params)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(direction):
        part, *_, kind = path_of(keys)
        decays = 0.5 if kind == "kernel" else 0.0
        np.testing.assert_allclose(leaf, decays * (10 if part == "head" else 1))


def test_pretrained_features_are_the_whole_of_imagenets_network_but_its_classes():
    config = configs.default()
    configs.use_network(config, "classifier")
    configs.use_pretrained(config)
    assert (config.model.backbone, config.model.output_stride) == ("efficientnet_lite0", 32)
    assert (config.optimizer.learning_rate, config.optimizer.head_factor) == (0.01, 1.0)
    file = pretrained.FILES["efficientnet_lite0", "imagenet"]
    try:
        importlib.metadata.distribution(file.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{file.package} is not installed")
    shapes = shapes_of(models.load(config.model, 37))
    loaded, lines = pretrained.load({"a": configs.model_of(config, "a")}, {"a": shapes})
    assert lines == [
        "efficientnet_lite0 of a starts from imagenet: 245 arrays of backbone, 2 of the file not "
        "used (_fc.bias, _fc.weight)."
    ]
    published = pth.read(pretrained.find(file))
    last = loaded["a"].params["backbone"]["last"]["conv"]["kernel"]
    np.testing.assert_array_equal(last[0, 0].T, published["_conv_head.weight"][:, :, 0, 0])
    assert loaded["a"].params["head"]["classifier"]["kernel"].shape == (1, 1, 1280, 37)


def test_networks_without_a_backbone_refuse_pretrained_ones():
    config = configs.default()
    configs.use_network(config, "wide_resnet")
    with pytest.raises(UserError, match=r"wide_resnet has none\. Use the network classifier"):
        configs.use_pretrained(config)
    assert pretrained.load({"a": configs.model_of(config, "a")}, {}) == ({}, [])
