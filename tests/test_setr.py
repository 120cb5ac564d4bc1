import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_models import apply, jit, make, path_of, random_image

from jaxssl import inference
from jaxssl.contracts import UserError, Variables
from jaxssl.models import layers, pretrained, torch_names, vit_names

MINI = {"name": "setr", "num_classes": 5, "backbone": "vit_mini", "patch": 8, "channels": 24}
GRID = 5
"""Patches a side of the images that the twins were trained on."""


@pytest.fixture(scope="module")
def twins():
    pytest.importorskip("torch")
    import torch_vit

    return torch_vit


def twin_of(twins, *, size=(96, 4, 3), patch=8, tokens=1):
    """A random SETR with 5 classes; `size` is width, depth and heads."""
    backbone = twins.VisionTransformer(*size, patch, GRID, tokens)
    return twins.randomized(twins.SETR(backbone, MINI["channels"], MINI["num_classes"]))


def shapes_of(size=(40, 40), **fields):
    net = make(**MINI | fields)
    return jax.eval_shape(lambda: net.init(jax.random.key(0), size))


def converted(twins, twin, **fields):
    """A twin's parameters and statistics as ours, by way of mmseg's names."""
    weights = torch_names.find(twins.mmseg_names(twin.state_dict()), "F")
    model = {**MINI, "pretrained": "F", **fields}
    filled, report = pretrained.start(
        shapes_of(**fields, size=(GRID * model["patch"],) * 2), weights, model
    )
    assert (report.missing, report.unused, report.left_out) == ((), (), ())
    return filled


@pytest.fixture(scope="module")
def mini(twins):
    """A network, its variables, and its twin."""
    twin = twin_of(twins)
    return make(**MINI), converted(twins, twin), twin


@pytest.fixture(scope="module")
def evaluated(mini):
    net, variables, _ = mini
    return apply(net, batch_stats=False)(*variables, random_image((2, 24, 56)))[0]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("size", "grid"), [((24, 56), (3, 7)), ((40, 40), (5, 5)), ((30, 55), (4, 7))]
)
def test_logits_equal_pytorchs_at_any_size(twins, mini, size, grid):
    net, variables, twin = mini
    image = random_image((2, *size))
    with twins.torch.no_grad():
        expected = twin(twins.torch.from_numpy(image)).numpy()
    outputs, _ = apply(net, batch_stats=False)(*variables, image)
    assert outputs.logits.shape == (2, *grid, 5)
    assert outputs.features.shape == (2, *grid, 24)
    assert expected.std() > 0.5
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-4)


@pytest.mark.torch
def test_vit_tiny_equals_pytorchs(twins):
    fields = {"backbone": "vit_tiny", "patch": 16, "preprocessing": "imagenet"}
    twin = twin_of(twins, size=(192, 12, 3), patch=16)
    mean = twins.torch.tensor((123.675, 116.28, 103.53))
    std = twins.torch.tensor((58.395, 57.12, 57.375))
    image = random_image((1, 48, 64))
    with twins.torch.no_grad():
        expected = twin(twins.torch.from_numpy(image), mean, std)
    net = make(**MINI | fields)
    outputs, _ = apply(net, batch_stats=False)(*converted(twins, twin, **fields), image)
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-4)


@pytest.mark.torch
def test_gradients_equal_pytorchs(twins, mini):
    _, variables, _ = mini
    image = random_image((2, 24, 56)).astype(np.float64)
    with jax.enable_x64(True):
        net = make(**MINI, dtype="float64")
        params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), tuple(variables))

        def loss(params):
            outputs, _ = net.apply(params, stats, image, batch_stats=True)
            return (outputs.logits**2).mean()

        grads = jit(jax.grad(loss))(params)
    twin = twin_of(twins).double().train()
    (twin(twins.torch.from_numpy(image)) ** 2).mean().backward()
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters()}
    # A token and its position are one parameter here, with the gradient of either.
    theirs["backbone.positions"][:, 0] = 0
    weights = torch_names.find(twins.mmseg_names(theirs), "F")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float64), params)
    expected, report = pretrained.fill(Variables(like, {}), weights.arrays, weights.name_of)
    assert (report.missing, report.unused) == ((), ())
    # Attention's softmax is float32 in JAX.
    assert_trees_equal(grads, expected.params, atol=1e-7, rtol=1e-4)


def assert_trees_equal(ours, theirs, **tolerance):
    for (keys, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_allclose(a, b, **tolerance, err_msg=str(path_of(keys)))


@pytest.mark.torch
def test_the_classifier_multiplies_the_features(mini, evaluated):
    net, variables, _ = mini
    kernel, bias = net.classifier(variables.params)
    expected = evaluated.features @ np.asarray(kernel) + bias
    np.testing.assert_allclose(evaluated.logits, expected, atol=1e-4)


@pytest.mark.torch
def test_bfloat16_stays_near_float32(mini, evaluated):
    _, variables, _ = mini
    run = apply(make(**MINI, dtype="bfloat16"), batch_stats=False)
    logits = run(*variables, random_image((2, 24, 56)))[0].logits
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - evaluated.logits).max() < 0.1 * np.abs(evaluated.logits).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_outputs_and_parameters_are_wide(dtype):
    with jax.enable_x64(dtype == "float64"):
        net = make(**MINI, dtype=dtype, auxiliary=True, embedding=6)
        variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (33, 33)))
        run = functools.partial(net.apply, batch_stats=True)
        image = jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.uint8)
        outputs, stats = jax.eval_shape(run, *variables, image)
        wide = jnp.dtype("float64" if dtype == "float64" else "float32")
        assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs, stats))} == {wide}
        assert jax.tree.map(jnp.shape, stats) == jax.tree.map(jnp.shape, variables.stats)
        assert outputs.embedding.shape == (2, 5, 5, 6)
        assert outputs.auxiliary.shape == (2, 5, 5, 5)


def test_noise_needs_a_key_and_goes_by_depth(monkeypatch):
    rates = []

    def recorded(rate, **settings):
        rates.append(rate)
        return dropout(rate, **settings)

    dropout = layers.Dropout
    monkeypatch.setattr(layers, "Dropout", recorded)
    fields = {"stochastic_depth": 0.8, "stochastic_depth_schedule": "linear", "dropout": 0.3}
    net, variables = make(**MINI, **fields), shapes_of()

    def draws(key):
        run = functools.partial(net.apply, batch_stats=True, key=key)
        return "random_bits" in str(jax.make_jaxpr(run)(*variables, random_image((1, 40, 40))))

    assert draws(jax.random.key(0))
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.15, 0.2, 0.3])
    assert not draws(None)


def test_stochastic_depth_drops_branches_of_whole_images():
    net = make(**MINI, stochastic_depth=0.5)
    variables = net.init(jax.random.key(0), (16, 16))
    image = np.repeat(random_image((1, 16, 16)), 16, 0)
    run = apply(net, batch_stats=False)
    kept = run(*variables, image, key=jax.random.key(1))[0].features
    assert 8 < len(np.unique(np.asarray(kept), axis=0)) <= 16
    assert len(np.unique(np.asarray(run(*variables, image)[0].features), axis=0)) == 1


def test_remat_wraps_each_block():
    net, variables = make(**MINI, remat=True), shapes_of()
    run = functools.partial(net.apply, batch_stats=True)
    assert str(jax.make_jaxpr(run)(*variables, random_image((1, 40, 40)))).count("remat") == 4
    assert jax.tree.map(jnp.shape, shapes_of(remat=True)) == jax.tree.map(jnp.shape, variables)


def test_init():
    params, stats = make(**MINI).init(jax.random.key(0), (48, 80))
    assert sorted(params) == ["backbone", "head"]
    assert params["backbone"]["positions"].shape == (6, 10, 96)
    for keys, leaf in jax.tree_util.tree_leaves_with_path((params["backbone"], stats)):
        name = str(path_of(keys[1:])[-1])
        if name in ("kernel", "positions", "tokens"):
            assert np.std(leaf) == pytest.approx(0.02, rel=4 / np.sqrt(2 * leaf.size))
        else:
            np.testing.assert_array_equal(leaf, name in ("scale", "var"))


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_tokens_are_not_patches(tokens):
    net, variables = make(**MINI, tokens=tokens), shapes_of(tokens=tokens)
    leaf = variables.params["backbone"].get("tokens")
    assert (leaf is None) if tokens == 0 else leaf.shape == (1, tokens, 96)
    run = functools.partial(net.apply, batch_stats=False)
    outputs, _ = jax.eval_shape(run, *variables, jax.ShapeDtypeStruct((1, 24, 56, 3), jnp.uint8))
    assert outputs.logits.shape == (1, 3, 7, 5)


def test_whole_images_of_any_size_are_predicted():
    net, variables = make(**MINI | {"patch": 16}), shapes_of(patch=16)
    image = jax.ShapeDtypeStruct((1, 500, 375, 3), jnp.uint8)
    valid = jax.ShapeDtypeStruct((1, 500, 375), jnp.bool_)
    logits = jax.eval_shape(inference.make_predict(net), variables, image, valid)
    assert logits.shape == (1, 500, 375, 5)


@pytest.mark.parametrize(
    ("backbone", "parameters", "width"),
    # timm's counts with 1000 classes
    [
        ("vit_tiny", 5_717_416, 192),
        ("vit_small", 22_050_664, 384),
        ("vit_base", 86_567_656, 768),
        ("vit_large", 304_326_632, 1024),
    ],
)
def test_full_size(backbone, parameters, width):
    net = make(name="setr", backbone=backbone, auxiliary=True)
    params, _ = jax.eval_shape(lambda: net.init(jax.random.key(0), (224, 224)))
    classifier, position_of_the_token = 1000 * (width + 1), width
    count = sum(leaf.size for leaf in jax.tree.leaves(params["backbone"]))
    assert count == parameters - classifier - position_of_the_token
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), (768, 768)))
    image = jax.ShapeDtypeStruct((8, 768, 1024, 3), jnp.uint8)
    outputs, _ = jax.eval_shape(functools.partial(net.apply, batch_stats=True), *variables, image)
    assert outputs.logits.shape == outputs.auxiliary.shape == (8, 48, 64, 19)
    assert outputs.features.shape == (8, 48, 64, 256)


@pytest.mark.parametrize(
    ("field", "value"),
    [("backbone", "resnet50"), ("patch", 0), ("tokens", 3), ("dropout", 1.0), ("pretrained", "x")],
)
def test_refuses(field, value):
    with pytest.raises(UserError, match=rf"model\.{field} is .*; it must be"):
        make(name="setr", **{field: value})


def test_has_no_fields_of_convolutional_networks():
    with pytest.raises(UserError, match="no field 'output_stride'"):
        make(name="setr", output_stride=8)


def saved(state, file):
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    safetensors.numpy.save_file(arrays, file)
    return str(file)


def features_of(net, variables, image):
    """The backbone's normalized output."""
    backbone = net.module(batch_stats=False).backbone
    x = (image.astype(np.float32) - net.mean) / np.float32(net.std)
    return jit(lambda params, x: backbone.apply({"params": params}, x)[-1])(
        variables.params["backbone"], jnp.asarray(x, jnp.float32)
    )


@pytest.mark.torch
@pytest.mark.parametrize("tokens", [1, 2, 0])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_timms_weights_are_read(twins, tokens, prefix, tmp_path):
    twin = twin_of(twins, tokens=tokens).backbone
    state = twins.timm_names(twin.state_dict()) | {"head.weight": np.ones((7, 96))}
    state |= {"head_dist.weight": np.ones((7, 96))} if tokens == 2 else {}
    path = saved(
        {prefix + name: array for name, array in state.items()}, tmp_path / "w.safetensors"
    )
    model = {**MINI, "pretrained": path, "tokens": tokens}
    loaded, (line,) = pretrained.load({"a": model}, {"a": shapes_of(tokens=tokens)})
    unused = 2 if tokens == 2 else 1
    assert f"starts from {path}: {len(jax.tree.leaves(loaded['a'].params['backbone']))} arr" in line
    assert f"of backbone, {unused} of the file not used ({prefix}head.weight" in line
    image = random_image((2, 24, 56))
    with twins.torch.no_grad():
        expected = twin(twins.torch.from_numpy(image / 127.5 - 1).permute(0, 3, 1, 2))
    ours = features_of(make(**MINI, tokens=tokens), loaded["a"], image)
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1), atol=1e-4)


@pytest.mark.torch
def test_positions_are_resized_to_the_networks_grid(twins):
    state = twins.timm_names(twin_of(twins).backbone.state_dict())
    weights = torch_names.find(state, "F")
    filled, _ = pretrained.start(shapes_of(size=(32, 80)), weights, MINI | {"pretrained": "F"})
    grid = state["pos_embed"][:, 1:].reshape(1, GRID, GRID, 96).transpose(0, 3, 1, 2)
    expected = twins.F.interpolate(twins.torch.from_numpy(grid), (4, 10), mode="bilinear")
    ours = filled.params["backbone"]["positions"]
    assert isinstance(ours, np.ndarray)
    np.testing.assert_allclose(ours, expected[0].permute(1, 2, 0), atol=1e-5)


@pytest.mark.torch
def test_positions_of_patches_alone(twins):
    state = twins.timm_names(twin_of(twins).backbone.state_dict())
    alone = state | {"pos_embed": state["pos_embed"][:, 1:]}
    alone["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    both = [vit_names.prepare(arrays, "F") for arrays in (state, alone)]
    for name, array in both[0].items():
        np.testing.assert_array_equal(array, both[1][name])


@pytest.mark.torch
def test_scales_of_branches_go_into_their_matrices(twins):
    twin = twin_of(twins).backbone
    state, rng = twins.timm_names(twin.state_dict()), np.random.default_rng(0)

    class Scale(twins.nn.Module):
        def __init__(self, name):
            super().__init__()
            state[name] = rng.uniform(0.1, 2, 96).astype(np.float32)
            self.factor = twins.torch.from_numpy(state[name])

        def forward(self, x):
            return x * self.factor

    for i, block in enumerate(twin.blocks):
        block.dropout1, block.dropout2 = (Scale(f"blocks.{i}.ls{j}.gamma") for j in (1, 2))
    image = random_image((1, 40, 40))
    # With gradients, because without them PyTorch takes a path that knows no such layers.
    expected = twin(twins.torch.from_numpy(image / 127.5 - 1).permute(0, 3, 1, 2)).detach()
    weights = torch_names.find(state, "F")
    filled, report = pretrained.start(shapes_of(), weights, MINI | {"pretrained": "F"})
    assert report.unused == ()
    ours = features_of(make(**MINI), filled, image)
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1), atol=1e-4)


def timm_shapes(width=96, depth=4, patch=8, tokens=1, grid=GRID):
    """Zeros with timm's names."""
    block = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width)}
    block |= {"attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
    block |= {"mlp.fc2": (width, 4 * width)}
    shapes = {"patch_embed.proj": (width, 3, patch, patch), "norm": (width,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    state = {}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": np.zeros(shape), f"{name}.bias": np.zeros(shape[0])}
    state["pos_embed"] = np.zeros((1, tokens + grid**2, width))
    names = ("cls_token", "dist_token")[:tokens]
    return state | {name: np.zeros((1, 1, width)) for name in names}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            {"width": 192, "depth": 12, "patch": 16},
            r"F holds vit_tiny with patches of 16 and tokens 1, and the network has vit_mini with "
            r"patches of 8 and tokens 1\. Take other weights, or set "
            r"--config\.model\.backbone=vit_tiny --config\.model\.patch=16$",
        ),
        ({"tokens": 2}, r"set --config\.model\.tokens=2$"),
        ({"tokens": 0}, r"set --config\.model\.tokens=0$"),
        ({"depth": 5}, r"holds a ViT of 5 blocks of width 96 .* There is no such network here"),
    ],
)
def test_another_transformer_says_what_to_set(file, message):
    weights = torch_names.find(timm_shapes(**file), "F")
    with pytest.raises(UserError, match=message):
        pretrained.start(shapes_of(), weights, MINI | {"pretrained": "F"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reg_token": (1, 4, 96)}, r"more than those here have \(reg_token \[1, 4, 96\]\)"),
        ({"blocks.1.attn.q_norm.weight": (32,)}, r"more than .* \(blocks\.1\.attn\.q_norm\.weight"),
        ({"pos_embed": (1, 29, 96)}, r"\[1, 29, 96\] is of no square grid with 1 tokens beside it"),
        ({"norm.weight": None}, r"lacks 1 arrays of vit_mini: backbone/norm/scale"),
        ({"blocks.0.mlp.fc1.weight": (100, 96)}, r"does not fit: blocks\.0\.mlp\.fc1\.weight"),
        ({"pos_embed": None}, r"holds no backbone that is known .* or a ViT with those of timm"),
    ],
)
def test_other_kinds_of_transformers_are_refused(changes, message):
    state = timm_shapes() | {k: v if v is None else np.zeros(v) for k, v in changes.items()}
    state = {name: array for name, array in state.items() if array is not None}
    with pytest.raises(UserError, match=message):
        pretrained.start(shapes_of(), torch_names.find(state, "F"), MINI | {"pretrained": "F"})


def test_transformers_and_convolutional_networks_do_not_share_weights(tmp_path):
    from test_torch_names import RESNET10, small_resnet
    from test_torch_names import shapes_of as shapes_of_resnet

    model = RESNET10 | {"pretrained": "F"}
    with pytest.raises(
        UserError, match=r"holds vit_mini .* has resnet10 .* SETR takes the weights"
    ):
        pretrained.start(shapes_of_resnet(**RESNET10), torch_names.find(timm_shapes(), "F"), model)
    with pytest.raises(
        UserError, match=r"holds resnet10 .* has vit_mini .* SETR takes the weights"
    ):
        pretrained.start(
            shapes_of(), torch_names.find(small_resnet(), "F"), MINI | {"pretrained": "F"}
        )
    path = saved(timm_shapes(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match='"caffe" is for ResNets'):
        pretrained.open_weights("vit_mini", path, bgr=True)


@pytest.mark.torch
def test_two_networks_share_a_backbone_not_a_head(twins, tmp_path):
    path = saved(twins.mmseg_names(twin_of(twins).state_dict()), tmp_path / "w.safetensors")
    models = {student: {**MINI, "pretrained": path} for student in "ab"}
    loaded, (line,) = pretrained.load(models, {student: shapes_of() for student in "ab"})
    assert "Left out: head (so that a and b differ)." in line
    assert isinstance(loaded["b"].params["head"]["classifier"]["bias"], jax.ShapeDtypeStruct)
