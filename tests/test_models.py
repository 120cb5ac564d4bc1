import dataclasses
import functools
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxssl import config as configs
from jaxssl import models
from jaxssl.contracts import UserError, Variables
from jaxssl.models import layers, resnet, segmentation

GOLDEN = pathlib.Path(__file__).parent / "golden" / "models.npz"
SMALL = {
    "backbone": "resnet10",
    "width": 8,
    "channels": 16,
    "low_level_channels": 8,
    "aspp_rates": (1, 2, 3),
    "auxiliary": True,
}
TINY = {"num_classes": 5} | SMALL
"""A network that is quick to differentiate; PyTorch's results for it are stored in `GOLDEN`."""


def make(num_classes=19, **fields):
    return models.load({"name": "deeplab_v3plus", **fields}, num_classes)


def path_of(keys):
    return tuple(key.key for key in keys)


def random_leaf(path, shape, rng):
    if path[-1] == "kernel":
        return rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:3]))
    if path[-1] in ("scale", "var"):
        low, high = (0.2, 0.6) if path[-2] in ("bn2", "bn3") and path[-1] == "scale" else (0.5, 1.5)
        return rng.uniform(low, high, shape)
    return 0.2 * rng.standard_normal(shape)


def random_network(fields, seed=0):
    """A network, random variables of it, and the same as `{path: array}`."""
    net, rng, leaves = make(**fields), np.random.default_rng(seed), {}

    def draw(keys, leaf):
        value = random_leaf(path_of(keys), leaf.shape, rng).astype(np.float32)
        leaves[path_of(keys)] = value
        return jnp.asarray(value)

    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), (32, 32)))
    params, stats = (jax.tree_util.tree_map_with_path(draw, tree) for tree in shapes)
    return net, Variables(params, stats), leaves


def random_image(shape, seed=1):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 255, (*shape, 3)).astype(np.float32)


def jit(function):
    """Compiles without optimization: here compiling takes the time, not running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def apply(net, **settings):
    return jit(functools.partial(net.apply, **settings))


@pytest.fixture(scope="module")
def tiny():
    return random_network(TINY)


@pytest.fixture(scope="module")
def image():
    return random_image((2, 49, 81))


@pytest.fixture(scope="module")
def evaluated(tiny, image):
    net, variables, _ = tiny
    return apply(net, batch_stats=False)(*variables, image)[0]


@pytest.fixture(scope="module")
def trained(tiny, image):
    """In float64: outputs and statistics of training, and the gradient of `objective`."""
    with jax.enable_x64(True):
        net = make(**TINY, dtype="float64")
        params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), tiny[1])

        def loss(params):
            outputs, new_stats = net.apply(params, stats, image, batch_stats=True)
            return objective(outputs.logits, outputs.auxiliary), (outputs, new_stats)

        grads, (outputs, new_stats) = jit(jax.grad(loss, has_aux=True))(params)
        return outputs, new_stats, grads


def objective(logits, auxiliary):
    return (logits**2).mean() + (auxiliary**2).mean()


def test_golden(evaluated):
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(evaluated.logits, golden["evaluated"], atol=1e-4)
    assert evaluated.auxiliary is None
    assert evaluated.embedding is None


def test_golden_training(tiny, image, trained):
    net, variables, _ = tiny
    single, _ = apply(net, batch_stats=True)(*variables, image)
    with np.load(GOLDEN) as golden:
        for name in ("logits", "auxiliary"):
            np.testing.assert_allclose(getattr(single, name), golden[name], atol=1e-4)
            np.testing.assert_allclose(getattr(trained[0], name), golden[name], atol=1e-9)


def test_classifier_multiplies_features(tiny, evaluated):
    net, variables, _ = tiny
    kernel, bias = map(np.asarray, net.classifier(variables.params))
    assert kernel.shape == (16, 5)
    expected = np.asarray(evaluated.features) @ kernel + bias
    np.testing.assert_allclose(evaluated.logits, expected, atol=1e-5)
    with pytest.raises(UserError, match="does not end in one 1x1 convolution"):
        net.classifier({"head": {}})


def test_running_statistics_are_not_copied(tiny, image):
    net, variables, _ = tiny

    def run(params, stats, image):
        outputs, same = net.apply(params, stats, image, batch_stats=False)
        assert same is stats
        return outputs

    jax.eval_shape(run, *variables, image)


def test_invalid_pixels_have_no_influence(tiny, evaluated, image):
    net, variables, _ = tiny
    run = apply(net, batch_stats=False)
    valid = np.zeros(image.shape[:3], bool)
    valid[:, 5:30, 10:50] = True
    hidden, mean_color = (
        np.where(valid[..., None], image, np.float32(color)) for color in (7, net.mean)
    )
    first = run(*variables, image, valid=valid)[0].logits
    np.testing.assert_array_equal(first, run(*variables, hidden, valid=valid)[0].logits)
    everywhere = np.ones_like(valid)
    seen = run(*variables, mean_color, valid=everywhere)[0].logits
    np.testing.assert_allclose(first, seen, atol=1e-5)
    assert np.abs(first - evaluated.logits).max() > 0.1


def test_bfloat16_stays_near_float32(tiny, evaluated, image):
    _, variables, _ = tiny
    run = apply(make(**TINY, dtype="bfloat16"), batch_stats=False)
    logits = run(*variables, image)[0].logits
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - evaluated.logits).max() < 0.05 * np.abs(evaluated.logits).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("batch_stats", [True, False])
def test_dtypes_are_a_fixed_point(dtype, batch_stats):
    with jax.enable_x64(dtype == "float64"):
        net = make(**TINY, dtype=dtype)
        variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (33, 33)))
        image = jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.uint8)
        run = functools.partial(net.apply, batch_stats=batch_stats)
        outputs, stats = jax.eval_shape(run, *variables, image)
        describe = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.weak_type))
        assert describe(stats) == describe(variables.stats)
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs))} == {jnp.dtype(wide)}


def test_key_turns_on_noise(tiny, image):
    _, variables, _ = tiny

    def draws(key, **fields):
        run = functools.partial(make(**TINY, **fields).apply, batch_stats=True, key=key)
        return "random_bits" in str(jax.make_jaxpr(run)(*variables, image))

    key = jax.random.key(0)
    assert not draws(key)
    for noise in ({"dropout": 0.1}, {"stochastic_depth": 0.8}):
        assert draws(key, **noise)
        assert not draws(None, **noise)


def test_remat_wraps_each_block(tiny, image):
    net, variables, _ = tiny
    remat = make(**TINY, remat=True)
    run = functools.partial(remat.apply, batch_stats=True)
    assert str(jax.make_jaxpr(run)(*variables, image)).count("remat") == 4
    assert same_shapes(remat) == same_shapes(net)


def same_shapes(net):
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), (33, 33)))
    return jax.tree.map(jnp.shape, shapes)


def test_init():
    net = make(**TINY)
    params, stats = net.init(jax.random.key(0), (33, 33))
    assert sorted(params) == ["auxiliary", "backbone", "head"]
    for keys, leaf in jax.tree_util.tree_leaves_with_path((params, stats)):
        *_, layer, name = map(str, path_of(keys[1:]))
        if name == "kernel":
            fan_out = np.prod(leaf.shape[:2]) * leaf.shape[3]
            std = 0.01 if layer == "classifier" else np.sqrt(2 / fan_out)
            assert np.std(leaf) == pytest.approx(std, rel=4 / np.sqrt(2 * leaf.size))
        else:
            np.testing.assert_array_equal(leaf, name in ("scale", "var"))
    other, _ = net.init(jax.random.key(1), (33, 33))
    kernel = params["head"]["classifier"]["kernel"]
    assert not np.allclose(kernel, other["head"]["classifier"]["kernel"])


def test_load_refuses():
    with pytest.raises(UserError, match=r"'deeplab'.*There are: classifier, deeplab_v2, deep"):
        models.load({"name": "deeplab"}, 19)
    with pytest.raises(UserError, match=r"'layers'"):
        models.load({"name": "layers"}, 19)
    with pytest.raises(UserError, match=r"no field 'depth'. Its fields: dropout, align"):
        make(depth=50)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", "resnet51"),
        ("stem", "wide"),
        ("output_stride", 4),
        ("dtype", "float16"),
        ("dropout", 1.0),
        ("stochastic_depth", 0.0),
        ("stochastic_depth_schedule", "cosine"),
        ("multi_grid", (2, 4)),
    ],
)
def test_model_refuses(field, value):
    with pytest.raises(UserError, match=rf"model\.{field} is .*; it must be"):
        make(**{field: value})


NETWORKS = ("classifier", "deeplab_v2", "deeplab_v3plus", "mlp", "pspnet", "setr", "wide_resnet")
SIZES = {"mlp": ("hidden", (4,)), "setr": ("patch", 4), "wide_resnet": ("widen", 4)}
"""What a network's size depends on, and a value of it; for the others it is the width."""


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("small", [False, True])
def test_a_config_may_have_any_network(name, small):
    config = configs.default()
    configs.use_network(config, name, dropout=0.25)
    if small:
        configs.use_small(config)
    size, value = SIZES.get(name, ("width", 4))
    config.model_b[size] = value
    a, b = (models.load(configs.model_of(config, student), 3) for student in "ab")
    assert type(a) is type(b)
    assert type(a).__module__ == f"jaxssl.models.{name}"
    assert (a.dropout, b.dropout) == (0.25, 0.25)
    assert (getattr(a, size), getattr(b, size)) == (config.model[size], value)
    shared = {field.name for field in dataclasses.fields(segmentation.ConvolutionalNetwork)}
    assert vars(a).keys() - shared <= set(config.model)
    assert config.model.keys() == config.model_a.keys() == config.model_b.keys()


def test_students_may_have_different_networks():
    config = configs.default()
    configs.use_network(config, "deeplab_v2", dropout=0.5)
    configs.use_network(config, "pspnet", student="b", channels=32)
    config.model.width = 8
    a, b = (models.load(configs.model_of(config, student), 3) for student in "ab")
    assert [type(net).__module__.rpartition(".")[2] for net in (a, b)] == ["deeplab_v2", "pspnet"]
    assert (a.width, a.dropout, a.align_corners) == (8, 0.5, True)
    assert (b.width, b.dropout, b.channels, b.stem) == (64, 0.1, 32, "deep")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_line_gives_a_student_another_network():
    file = pathlib.Path(__file__).parents[1] / "configs" / "mkd_cityscapes.py"
    flags = {"model.width": 8, "model_b.name": "deeplab_v2", "model_b.backbone": "resnet18"}
    config = configs.from_arguments(
        [f"--config={file}", *(f"--config.{key}={value}" for key, value in flags.items())]
    )
    a, b = (configs.model_of(config, student) for student in "ab")
    assert a == {**config.model}
    assert b == {**configs.model_section("deeplab_v2"), "backbone": "resnet18"}
    assert models.load(b, 3).aspp_branches == 4


def test_the_variant_of_a_convolutional_backbone_is_for_networks_that_have_one():
    config = configs.default()
    configs.use_network(config, "setr")
    with pytest.raises(UserError, match=r"setr has none\. Set --config\.model\.pretrained"):
        configs.use_pretrained(config)


def test_the_default_network_is_one_of_them():
    config = configs.default()
    configs.use_network(config, "deeplab_v3plus")
    assert config == configs.default()
    configs.use_network(config, "mine", depth=3)
    assert config.model.to_dict() == {"name": "mine", "depth": 3}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_line_sets_fields_of_the_network(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from jaxssl import config as configs\n\n"
        "def get_config():\n"
        "    config = configs.default()\n"
        "    configs.use_network(config, 'deeplab_v2')\n"
        "    return config\n"
    )
    arguments = [f"--config={file}", "--config.model.aspp_branches=2"]
    config = configs.from_arguments([*arguments, "--config.model_b.aspp_branches=3"])
    branches = [models.load(configs.model_of(config, s), 3).aspp_branches for s in "ab"]
    assert branches == [2, 3]
    with pytest.raises(UserError, match="no key 'low_level_channels'"):
        configs.from_arguments([*arguments, "--config.model.low_level_channels=8"])


def test_float64_needs_x64():
    with jax.enable_x64(False), pytest.raises(UserError, match="JAX_ENABLE_X64"):
        make(dtype="float64")


def test_network_is_hashable_and_one_file(tmp_path, monkeypatch):
    assert hash(make(aspp_rates=[1, 2, 3])) == hash(make(aspp_rates=(1, 2, 3)))
    (tmp_path / "mine.py").write_text("from jaxssl.models.deeplab_v3plus import Model")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    assert models.load({"name": "mine"}, 3).num_classes == 3
    assert models.available() == tuple(sorted((*NETWORKS, "mine")))


def test_axis_name_reaches_batch_norm(tiny, image):
    _, variables, _ = tiny
    net = models.load({"name": "deeplab_v3plus"} | SMALL, 5, axis_name="devices")
    with pytest.raises(NameError, match="devices"):
        jax.eval_shape(functools.partial(net.apply, batch_stats=True), *variables, image)


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    # torchvision's counts less 513000 or 2049000 for the last layer
    [
        ("resnet18", 11176512),
        ("resnet34", 21284672),
        ("resnet50", 23508032),
        ("resnet101", 42500160),
    ],
)
def test_full_size(backbone, parameters):
    net = make(backbone=backbone, stem="conv7", auxiliary=True)
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (512, 1024)))
    assert sum(x.size for x in jax.tree.leaves(variables.params["backbone"])) == parameters
    image = jax.ShapeDtypeStruct((16, 512, 1024, 3), jnp.uint8)
    outputs, _ = jax.eval_shape(functools.partial(net.apply, batch_stats=True), *variables, image)
    assert outputs.logits.shape == (16, 128, 256, 19)
    assert outputs.features.shape == (16, 128, 256, 256)
    assert outputs.auxiliary.shape == (16, 32, 64, 19)


RESNET18 = {"backbone": "resnet18", "width": 16, "channels": 32, "low_level_channels": 12}
RESNET50 = {"backbone": "resnet50", "width": 16, "channels": 32, "low_level_channels": 12}
U2PL = {
    "output_stride": 8,
    "multi_grid": [2, 2, 4],
    "stem_width": 16,
    "separable": False,
    "aspp_rates": (12, 24, 36),
    "align_corners": True,
}


@pytest.fixture(scope="module")
def twins():
    pytest.importorskip("torch")
    import torch_twin

    return torch_twin


@pytest.mark.torch
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        (RESNET18 | {"stem": "conv7", "output_stride": 32, "separable": False}, (65, 97)),
        (RESNET18 | {"output_stride": 16, "align_corners": True}, (49, 81)),
        (RESNET18 | {"stem": "conv7", "output_stride": 8}, (64, 96)),
        (RESNET50 | U2PL, (49, 81)),
        (RESNET50 | {"stem": "conv7", "output_stride": 32, "align_corners": True}, (65, 97)),
        ({"backbone": "resnet50"}, (65, 97)),
    ],
)
def test_logits_equal_pytorch(twins, fields, size):
    net, variables, leaves = random_network({"num_classes": 19, **fields})
    twin = twins.DeepLabV3Plus(num_classes=19, **fields)
    twins.load(twin, leaves)
    image = random_image((1, *size))
    with twins.torch.no_grad():
        expected, _ = twin.eval()(twins.torch.from_numpy(image))
    logits = apply(net, batch_stats=False)(*variables, image)[0].logits
    assert np.std(expected.numpy()) > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.torch
def test_training_equals_pytorch(twins, tiny, trained, image):
    _, stats, grads = trained
    twin = twins.DeepLabV3Plus(**TINY).double().train()
    twins.load(twin, tiny[2])
    counts = twins.count_normalized(twin)
    objective(*twin(twins.torch.from_numpy(image).double())).backward()
    assert_same_update(twins, twin, counts, tiny[2], grads, stats)


def assert_same_update(twins, twin, counts, before, grads, stats):
    """Gradients and new statistics are those of a twin after its backward pass.

    Args:
      counts: of `count_normalized`.
      before: `{path: array}`.
    """
    state = twin.state_dict() | {name: p.grad for name, p in twin.named_parameters()}
    for keys, leaf in jax.tree_util.tree_leaves_with_path((grads, stats)):
        path = path_of(keys[1:])
        name, ours = twins.name_and_tensor(path, leaf)
        theirs = state[name].numpy()
        if path[-1] == "var":
            # PyTorch puts the variance times n / (n - 1) into its running variance.
            n, old = counts[name.removesuffix(".running_var")], before[path]
            theirs = 0.9 * old + (theirs - 0.9 * old) * (n - 1) / n
        np.testing.assert_allclose(ours, theirs, atol=1e-8, rtol=1e-7, err_msg=name)


@pytest.mark.torch
@pytest.mark.parametrize("fields", [{}, U2PL | {"backbone": "resnet101", "auxiliary": True}])
def test_parameter_counts_equal_pytorch(twins, fields):
    with twins.torch.device("meta"):
        twin = twins.DeepLabV3Plus(num_classes=19, **fields)
    net = make(**fields)
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (65, 65)))
    expected = sum(p.numel() for p in twin.parameters())
    assert sum(x.size for x in jax.tree.leaves(variables.params)) == expected


def convolved(x, kernel, stride, dilation, groups):
    """Convolution from its definition, one output pixel at a time."""
    (kh, kw, _, outputs), (b, h, w, inputs) = kernel.shape, x.shape
    top, left = dilation * (kh // 2), dilation * (kw // 2)
    padded = np.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))
    weights = kernel.reshape(kh, kw, inputs // groups, groups, outputs // groups)
    result = np.zeros((b, -(-h // stride), -(-w // stride), outputs))
    for i, j in np.ndindex(result.shape[1:3]):
        y, x0 = i * stride, j * stride
        window = padded[:, y : y + 2 * top + 1 : dilation, x0 : x0 + 2 * left + 1 : dilation]
        window = window.reshape(b, kh, kw, groups, inputs // groups)
        result[:, i, j] = np.einsum("bhwgi,hwigo->bgo", window, weights).reshape(b, outputs)
    return result


@pytest.mark.parametrize(
    ("form", "groups"), [("plain", 1), ("matmul", 1), ("plain", 6), ("shifted", 6), ("plain", 2)]
)
@pytest.mark.parametrize(
    ("size", "stride", "dilation"),
    [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 5), (3, 2, 9)],
)
def test_convolution(form, groups, size, stride, dilation):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 10, 6)).astype(np.float32)
    kernel = rng.standard_normal((size, size, 6 // groups, 6)).astype(np.float32)
    settings = {"stride": stride, "dilation": dilation, "groups": groups}
    expected = convolved(x, kernel, *settings.values())
    y = layers.convolution(jnp.asarray(x), jnp.asarray(kernel), **settings, form=form)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_convolution_refuses_a_form_that_cannot():
    x, kernel = jnp.ones((1, 4, 4, 6)), jnp.ones((3, 3, 3, 6))
    with pytest.raises(ValueError, match="depthwise"):
        layers.convolution(x, kernel, groups=2, form="shifted")
    with pytest.raises(ValueError, match="one group"):
        layers.convolution(x, kernel, groups=2, form="matmul")


@pytest.mark.parametrize(
    ("shape", "dilation", "groups", "cpu"),
    [
        ((3, 3, 1, 32), 1, 32, "shifted"),
        ((1, 1, 64, 64), 1, 1, "matmul"),
        ((3, 3, 2048, 256), 12, 1, "matmul"),
        ((3, 3, 128, 32), 12, 1, "plain"),
        ((3, 3, 512, 512), 2, 1, "plain"),
        ((3, 3, 16, 32), 1, 2, "plain"),
    ],
)
def test_fastest_form(monkeypatch, shape, dilation, groups, cpu):
    for backend, form in (("cpu", cpu), ("gpu", "plain"), ("tpu", "plain")):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert layers.fastest_form(shape, dilation=dilation, groups=groups) == form


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("sizes", [(5, 17), (17, 5), (4, 16), (9, 9), (1, 7), (6, 1), (7, 4)])
def test_resize_bilinear(sizes, align_corners):
    old, new = sizes
    x = np.random.default_rng(0).standard_normal((2, old, 3, 4)).astype(np.float32)
    if align_corners:
        at = np.arange(new) * (old - 1) / max(new - 1, 1)
    else:
        at = (np.arange(new) + 0.5) * old / new - 0.5
    expected = np.apply_along_axis(lambda column: np.interp(at, np.arange(old), column), 1, x)
    y = layers.resize_bilinear(jnp.asarray(x), (new, 3), align_corners=align_corners)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    turned = layers.resize_bilinear(
        jnp.asarray(x.swapaxes(1, 2)), (3, new), align_corners=align_corners
    )
    np.testing.assert_allclose(turned, expected.swapaxes(1, 2), atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(7, 1), (7, 2), (13, 6), (12, 6), (5, 6), (4, 4)])
def test_adaptive_average_pool(old, new):
    x = np.random.default_rng(0).standard_normal((2, old, 9, 4)).astype(np.float32)
    edges = [(math.floor(i * old / new), math.ceil((i + 1) * old / new)) for i in range(new)]
    thirds = [x[:, begin:end].mean(1).reshape(2, 3, 3, 4).mean(2) for begin, end in edges]
    y = layers.adaptive_average_pool(jnp.asarray(x), (new, 3))
    np.testing.assert_allclose(y, np.stack(thirds, 1), atol=1e-6)
    turned = layers.adaptive_average_pool(jnp.asarray(x.swapaxes(1, 2)), (3, new))
    np.testing.assert_allclose(turned.swapaxes(1, 2), np.stack(thirds, 1), atol=1e-6)


def normalized(x, mean, var, variables):
    params = variables["params"]
    return (x - mean) / np.sqrt(var + 1e-5) * np.asarray(params["scale"]) + params["bias"]


@pytest.mark.parametrize("axis_name", [None, "devices"])
def test_batch_norm(axis_name):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (4, 5, 6, 3)).astype(np.float32)
    scale, bias, mean, var = rng.uniform(0.5, 2, (4, 3)).astype(np.float32)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    y = layers.BatchNorm(batch_stats=False).apply(variables, x)
    np.testing.assert_allclose(y, normalized(x, mean, var, variables), atol=1e-5)

    norm = layers.BatchNorm(batch_stats=True, momentum=0.2, axis_name=axis_name)
    run = functools.partial(norm.apply, mutable=["batch_stats"])
    if axis_name is None:
        y, updated = run(variables, x)
    else:  # two devices with half of the batch each
        split = jax.vmap(run, in_axes=(None, 0), out_axes=(0, None), axis_name=axis_name)
        y, updated = split(variables, x.reshape(2, 2, *x.shape[1:]))
    axes = (0, 1, 2)
    expected = normalized(x, x.mean(axes), x.var(axes), variables)
    np.testing.assert_allclose(np.reshape(y, x.shape), expected, atol=1e-5)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.8 * mean + 0.2 * x.mean(axes), atol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.8 * var + 0.2 * x.var(axes), atol=1e-5)


def test_a_value_alone_does_not_normalize_itself():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (1, 1, 1, 3)).astype(np.float32)
    scale, bias, mean, var = rng.uniform(0.5, 2, (4, 3)).astype(np.float32)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    norm = layers.BatchNorm(batch_stats=True)
    y, updated = norm.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, normalized(x, mean, var, variables), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])


def test_batch_norm_computes_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(50, 1, (4, 9, 9, 3)), jnp.bfloat16)
    variables = {"params": {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}}
    norm = layers.BatchNorm(batch_stats=True)
    y, updated = norm.apply(variables, x, mutable=["batch_stats"])
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    assert y.dtype == jnp.bfloat16
    expected = normalized(exact, mean, var, variables)
    np.testing.assert_allclose(y.astype(float), expected, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)


def test_dropout_takes_whole_channels():
    x = jnp.ones((50, 3, 4, 40))
    drop = layers.Dropout(0.25)
    np.testing.assert_array_equal(drop.apply({}, x), x)
    y = np.asarray(drop.apply({}, x, rngs={"dropout": jax.random.key(0)}))
    assert (y == y[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(
    ("output_stride", "grid", "first", "strides", "dilations"),
    [
        (32, (1, 1, 1), False, [1, 2, 2, 2], [(1,), (1,), (1,), (1, 1, 1)]),
        (16, (1, 2, 4), False, [1, 2, 2, 1], [(1,), (1,), (1,), (1, 4, 8)]),
        (8, (1, 1, 1), False, [1, 2, 1, 1], [(1,), (1,), (1, 2), (2, 4, 4)]),
        (8, (2, 2, 4), False, [1, 2, 1, 1], [(1,), (1,), (1, 2), (4, 8, 16)]),
        (8, (1, 1, 1), True, [1, 2, 1, 1], [(1,), (1,), (2, 2), (4, 4, 4)]),
        (16, (1, 2, 4), True, [1, 2, 2, 1], [(1,), (1,), (1,), (2, 4, 8)]),
    ],
)
def test_plan(output_stride, grid, first, strides, dilations):
    plan = list(resnet.plan((3, 4, 6, 3), output_stride, grid, dilate_first=first))
    stages = [list(blocks) for _, blocks in itertools.groupby(plan, lambda b: b.stage)]
    assert [blocks[0].stride for blocks in stages] == strides
    assert all(b.stride == 1 for blocks in stages for b in blocks[1:])
    for blocks, expected in zip(stages, dilations, strict=True):
        full = expected + expected[-1:] * (len(blocks) - len(expected))
        assert tuple(b.dilation for b in blocks) == full
    assert [b.name for b in stages[3]] == ["layer4_0", "layer4_1", "layer4_2"]


def test_survival_probabilities():
    constant = [b.survival for b in resnet.plan((1, 1, 1, 1), survival=0.6)]
    linear = [b.survival for b in resnet.plan((1, 1, 1, 1), survival=0.6, schedule="linear")]
    np.testing.assert_allclose(constant, 0.6)
    np.testing.assert_allclose(linear, [0.9, 0.8, 0.7, 0.6])


@pytest.mark.parametrize("bottleneck", [True, False])
def test_block_noise_and_identity(bottleneck):
    make_block = functools.partial(
        resnet.Block,
        features=2 if bottleneck else 8,
        norm=functools.partial(layers.BatchNorm, batch_stats=False),
        bottleneck=bottleneck,
    )
    # So bright that no sum goes below zero: the branch is the block's output less its input.
    x = 100 + jax.random.normal(jax.random.key(0), (200, 2, 3, 8))
    variables = jit(make_block().init)(jax.random.key(1), x)
    branch = jit(make_block().apply)(variables, x) - x
    noisy = jit(make_block(survival=0.7).apply)(variables, x, rngs={"dropout": jax.random.key(2)})
    kept = np.abs(noisy - x).max((1, 2, 3)) > 0
    assert kept.mean() == pytest.approx(0.7, abs=0.1)
    expected = np.where(kept[:, None, None, None], branch / 0.7, 0)
    np.testing.assert_allclose(noisy - x, expected, atol=1e-3)

    still, _ = jit(make_block(zero_init=True).init_with_output)(jax.random.key(1), x)
    np.testing.assert_allclose(still, x)
