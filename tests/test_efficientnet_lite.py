import functools
import importlib.metadata
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxssl import models
from jaxssl.contracts import UserError, Variables
from jaxssl.models import layers, pretrained, pth

GOLDEN = pathlib.Path(__file__).parent / "golden" / "efficientnet_lite.npz"
CLASSES, KEPT = 7, 16
IMAGENET = pretrained.FILES["efficientnet_lite0", "imagenet"]


def recognizer(num_classes=1000, output_stride=32):
    """The network that ImageNet's weights were trained in."""
    fields = {"backbone": "efficientnet_lite0", "output_stride": output_stride}
    return models.load({"name": "classifier", **fields}, num_classes)


def jit(function):
    """Compiles without optimization: here compiling takes the time, not running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def stages_and_logits(net, variables, image):
    """Outputs of the backbone's stages, and logits, with running statistics."""

    def run(variables, image):
        module = net.module(batch_stats=False)
        trees = {"params": variables.params, "batch_stats": variables.stats}
        bound = module.bind(trees)
        image, valid = net.inputs(image, None)
        *stages, last = bound.backbone(image)
        return stages, bound.head(last, valid).logits

    return jit(run)(variables, image)


def shapes_of(net, size=(64, 64)):
    return jax.eval_shape(lambda: net.init(jax.random.key(0), size))


def random_leaf(path, shape, rng):
    if path[-1] == "kernel":
        inputs = np.prod(shape[:3])
        return rng.standard_normal(shape) * np.sqrt(2 / inputs)
    if path[-1] in ("scale", "var"):
        return rng.uniform(0.5, 1.5, shape)
    return 0.2 * rng.standard_normal(shape)


def random_network(output_stride, seed=0):
    """A network, random variables of it, and the same as `{path: array}`."""
    net = recognizer(CLASSES, output_stride)
    rng, leaves = np.random.default_rng(seed), {}

    def draw(keys, leaf):
        path = tuple(key.key for key in keys)
        leaves[path] = random_leaf(path, leaf.shape, rng).astype(np.float32)
        return jnp.asarray(leaves[path])

    params, stats = (jax.tree_util.tree_map_with_path(draw, tree) for tree in shapes_of(net))
    return net, Variables(params, stats), leaves


def random_image(size=(48, 80), seed=1):
    return np.random.default_rng(seed).uniform(0, 255, (2, *size, 3)).astype(np.float32)


def test_golden():
    net, variables, _ = random_network(16)
    stages, logits = stages_and_logits(net, variables, random_image())
    with np.load(GOLDEN) as golden:
        close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
        close(stages[0], golden["low"])
        close(stages[-1][..., ::KEPT], golden["last"])
        close(logits, golden["logits"])


@pytest.mark.parametrize(("output_stride", "step"), [(16, 2), (8, 4)])
def test_dense_features_hold_the_strided_ones(output_stride, step):
    """Exchanging strides for dilation computes the same, at more places (`algorithme a trous`)."""
    strided, variables, _ = random_network(32)
    dense, _, _ = random_network(output_stride)
    image = random_image((64, 96))
    expected, _ = stages_and_logits(strided, variables, image)
    stages, _ = stages_and_logits(dense, variables, image)
    assert [stage.shape[1:] for stage in expected] == [
        (16, 24, 24),
        (8, 12, 40),
        (4, 6, 112),
        (2, 3, 320),
    ]
    # With TensorFlow's padding of even sizes, a strided output stands on every second input.
    at = slice(step - 1, None, step)
    np.testing.assert_allclose(stages[-1][:, at, at], expected[-1], atol=1e-4, rtol=1e-4)
    assert stages[-1].shape[1:3] == (64 // output_stride, 96 // output_stride)


@pytest.mark.parametrize("form", ["plain", "shifted"])
@pytest.mark.parametrize(
    ("size", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 2, 1), (5, 1, 2), (5, 1, 4)]
)
@pytest.mark.parametrize("shape", [(7, 10), (1, 2)])
def test_depthwise_convolution_and_its_gradient(form, size, stride, dilation, shape):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = rng.standard_normal((2, *shape, 6)), rng.standard_normal((size, size, 1, 6))

        def ours(x, kernel):
            settings = {"stride": stride, "dilation": dilation, "groups": 6}
            return layers.convolution(x, kernel, **settings, padding="same", form=form)

        def xlas(x, kernel):
            numbers = ("NHWC", "HWIO", "NHWC")
            rates = (dilation, dilation)
            return jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), "SAME", None, rates, numbers, feature_group_count=6
            )

        def with_gradients(convolve, gradient):
            y, pull = jax.vjp(convolve, x, kernel)
            return y, *pull(gradient)

        gradient = rng.standard_normal(jax.eval_shape(xlas, x, kernel).shape)
        results = (jit(functools.partial(with_gradients, f))(gradient) for f in (ours, xlas))
        for mine, theirs in zip(*results, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_size_is_the_published_one():
    count = sum(x.size for x in jax.tree.leaves(shapes_of(recognizer()).params))
    assert round(count / 1e6, 1) == 4.7


def test_features_are_what_the_classifier_multiplies():
    net, variables, _ = random_network(32)
    outputs, _ = jit(functools.partial(net.apply, batch_stats=False))(*variables, random_image())
    kernel, bias = net.classifier(variables.params)
    assert outputs.features.shape == (2, 1280)
    np.testing.assert_allclose(outputs.logits, outputs.features @ kernel + bias, atol=1e-4)


def test_backbone_brings_its_colors_and_may_be_refused():
    def make(**fields):
        return models.load({"name": "deeplab_v3plus", **fields}, 3)

    assert make(backbone="efficientnet_lite0").mean == (127, 127, 127)
    assert make(backbone="efficientnet_lite0").std == (128, 128, 128)
    assert make(backbone="resnet18").mean == (123.675, 116.28, 103.53)
    with pytest.raises(UserError, match=r"model\.pretrained is 'imagenet'; .* one of ''\.$"):
        make(backbone="resnet18", pretrained="imagenet")


def test_noise_needs_a_key():
    net = models.load(
        {"name": "deeplab_v3plus", "backbone": "efficientnet_lite0", "stochastic_depth": 0.8}, 3
    )
    variables = shapes_of(net)

    def draws(key):
        run = functools.partial(net.apply, batch_stats=True, key=key)
        return "random_bits" in str(jax.make_jaxpr(run)(*variables, random_image((33, 33))))

    assert draws(jax.random.key(0))
    assert not draws(None)


@pytest.fixture(scope="module")
def twins():
    pytest.importorskip("torch")
    import torch_efficientnet_lite

    return torch_efficientnet_lite


@pytest.mark.torch
@pytest.mark.parametrize(("output_stride", "size"), [(8, (64, 96)), (16, (49, 81)), (32, (65, 50))])
def test_stages_and_logits_equal_pytorch(twins, output_stride, size):
    net, variables, leaves = random_network(output_stride)
    twin = twins.EfficientNetLite0(CLASSES, output_stride).eval()
    twins.load(twin, leaves)
    image = random_image(size)
    with twins.torch.no_grad():
        expected_logits, expected = twin(twins.torch.from_numpy(image))
    stages, logits = stages_and_logits(net, variables, image)
    assert expected[-1].std() > 0.5
    for mine, theirs in zip(stages, expected, strict=True):
        # Sums round by their terms, which are as large as a stage's largest values.
        np.testing.assert_allclose(mine, theirs, atol=1e-4 * float(abs(theirs).max()), rtol=0)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def weights():
    """The published arrays, and the same as variables of `recognizer`."""
    try:
        importlib.metadata.distribution(IMAGENET.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{IMAGENET.package} is not installed")
    arrays = pth.read(pretrained.find(IMAGENET))
    variables, report = pretrained.fill(shapes_of(recognizer()), arrays, IMAGENET.name_of)
    assert not report.missing
    assert all(name.endswith("num_batches_tracked") for name in report.unused)
    return arrays, variables


@pytest.mark.torch
def test_published_weights_give_pytorchs_logits(twins, weights):
    arrays, variables = weights
    twin = twins.EfficientNetLite0().eval()
    twin.load_state_dict({k: twins.torch.tensor(v) for k, v in arrays.items()})
    image = random_image((224, 224))
    with twins.torch.no_grad():
        expected, _ = twin(twins.torch.from_numpy(image))
    _, logits = stages_and_logits(recognizer(), variables, image)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def photographs():
    """The twenty photographs in the package foolbox, as ImageNet is evaluated, and their classes:
    seven eighths of the shorter side, cut from the middle, resized bicubically to 224.
    """
    try:
        package = importlib.metadata.distribution("foolbox")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("foolbox is not installed")
    images, labels = [], []
    for file in package.files or ():
        if match := re.fullmatch(r"imagenet_\d+_(\d+)\.jpg", file.name):
            with Image.open(str(package.locate_file(file))) as image:
                side = min(image.size) * 224 // 256
                left, top = (image.width - side) // 2, (image.height - side) // 2
                box = (left, top, left + side, top + side)
                resized = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box)
            images.append(np.asarray(resized))
            labels.append(int(match[1]))
    return np.stack(images), np.array(labels)


def test_photographs_are_recognized(weights):
    images, labels = photographs()
    assert len(images) == 20
    _, logits = stages_and_logits(recognizer(), weights[1], images)
    assert (logits.argmax(-1) == labels).sum() >= 16
