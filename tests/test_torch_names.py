import functools
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_models import apply, make, path_of, random_image, random_leaf

from jaxssl.contracts import UserError, Variables
from jaxssl.models import pretrained, torch_names

NET = {"width": 8, "channels": 16, "low_level_channels": 8, "aspp_rates": (1, 2, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")

CONV7 = {"stem.0": "conv1", "stem.1": "bn1"}
SEMSEG = {
    "stem.0": "conv1",
    "stem.1": "bn1",
    "stem.3": "conv2",
    "stem.4": "bn2",
    "stem.6": "conv3",
    "stem.7": "bn3",
}
TIMM = {f"stem.{i}": f"conv1.{i}" for i in (0, 1, 3, 4, 6)} | {"stem.7": "bn1"}
PSPNET = {f"stem.{i}": f"layer0.{i}" for i in (0, 1, 3, 4, 6, 7)}
MMSEG = {f"stem.{i}": f"stem.{i}" for i in (0, 1, 3, 4, 6, 7)}


def leaves_of(tree):
    return {path_of(keys[1:]): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def shapes_of(**fields):
    net = make(**fields)
    return jax.eval_shape(lambda: net.init(jax.random.key(0), (32, 32)))


def random_variables(shapes, seed=0):
    """Random NumPy arrays in trees of such shapes."""
    rng = np.random.default_rng(seed)

    def draw(keys, leaf):
        return random_leaf(path_of(keys[1:]), leaf.shape, rng).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_state(variables, *parts):
    """What `torch_twin` calls the leaves of some parts, as NumPy arrays in PyTorch's layout: for
    backbones as mmseg names them.
    """
    twin = pytest.importorskip("torch_twin")
    found = leaves_of(variables).items()
    state = (twin.name_and_tensor(path, leaf) for path, leaf in found if path[0] in parts)
    return {name: tensor.numpy() for name, tensor in state}


def renamed(state, stem, prefix=""):
    """A backbone's state with another library's names for the stem, as a classifier is saved."""
    changed = {}
    for name, array in state.items():
        layer, _, leaf = name.removeprefix("backbone.").rpartition(".")
        changed[f"{prefix}{stem.get(layer, layer)}.{leaf}"] = array
        if leaf == "running_var":
            changed[f"{prefix}{stem.get(layer, layer)}.num_batches_tracked"] = np.array(7)
    return changed | {
        f"{prefix}fc.{leaf}": np.zeros((5, 3)[: 3 - i])
        for i, leaf in enumerate(("weight", "bias"), 1)
    }


def start(state, shapes, tmp_path, sharing=(), **model):
    file = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, file)
    model = {"backbone": "resnet18", "pretrained": str(file)} | model
    bgr = model.get("preprocessing") == "caffe"
    weights = pretrained.open_weights(model["backbone"], str(file), bgr=bgr)
    return pretrained.start(shapes, weights, model, sharing)


def assert_loaded(filled, variables, *parts):
    """Exactly the leaves of these parts are those of `variables`; the others are still shapes."""
    expected = leaves_of(variables)
    for path, leaf in leaves_of(filled).items():
        if path[0] in parts:
            np.testing.assert_array_equal(leaf, expected[path], err_msg=str(path))
        else:
            assert isinstance(leaf, jax.ShapeDtypeStruct)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("backbone", "stem", "names", "prefix"),
    [
        ("resnet18", "conv7", CONV7, ""),
        ("resnet34", "conv7", CONV7, "state_dict.module."),
        ("resnet50", "conv7", CONV7, "model.backbone."),
        ("resnet101", "deep", TIMM, ""),
        ("resnet50", "deep", SEMSEG, "module.encoder."),
        ("resnet50", "deep", PSPNET, "state_dict.module."),
        ("resnet18", "deep", MMSEG, "backbone."),
        ("resnet18", "deep", MMSEG, ""),
        ("resnet18", "deep", TIMM, "Scale."),
    ],
)
def test_every_librarys_names_are_read(backbone, stem, names, prefix, tmp_path):
    shapes = shapes_of(backbone=backbone, stem=stem, **NET)
    variables = random_variables(shapes)
    state = renamed(torch_state(variables, "backbone"), names, prefix)
    filled, report = start(state, shapes, tmp_path, backbone=backbone)
    assert_loaded(filled, variables, "backbone")
    assert report.unused == (f"{prefix}fc.bias", f"{prefix}fc.weight")
    assert len(report.missing) == sum(path[0] != "backbone" for path in leaves_of(shapes))
    assert report.left_out == ()


def mmseg_head(state):
    """The twin's heads as mmseg names them, written from its modules."""
    changed = {}
    for name, array in state.items():
        for pattern, replacement in (
            (r"head\.pool\.", "decode_head.image_pool.1."),
            (r"head\.aspp(\d)\.", r"decode_head.aspp_modules.\1."),
            (r"head\.low_level\.", "decode_head.c1_bottleneck."),
            (r"head\.decoder1\.", "decode_head.sep_bottleneck.0."),
            (r"head\.decoder2\.", "decode_head.sep_bottleneck.1."),
            (r"head\.classifier\.", "decode_head.conv_seg."),
            (r"head\.bottleneck\.", "decode_head.bottleneck."),
            (r"auxiliary\.conv\.", "auxiliary_head.convs.0."),
            (r"auxiliary\.classifier\.", "auxiliary_head.conv_seg."),
            (r"\.(depthwise|pointwise)\.", r".\1_conv."),
        ):
            name = re.sub(f"^{pattern}" if pattern[0] != "\\" else pattern, replacement, name)
        changed[name] = array
    return changed


@pytest.mark.torch
def test_heads_of_mmseg(tmp_path):
    fields = {"backbone": "resnet18", "auxiliary": True, **NET}
    shapes = shapes_of(**fields)
    variables = random_variables(shapes)
    state = mmseg_head(torch_state(variables, "backbone", "head", "auxiliary"))
    assert "decode_head.sep_bottleneck.1.pointwise_conv.bn.running_mean" in state
    filled, report = start(state, shapes, tmp_path)
    assert_loaded(filled, variables, "backbone", "head", "auxiliary")
    assert (report.missing, report.unused, report.left_out) == ((), (), ())
    # Not separable: the same names without depthwise and pointwise parts.
    whole = shapes_of(**fields, separable=False)
    variables = random_variables(whole)
    state = mmseg_head(torch_state(variables, "backbone", "head", "auxiliary"))
    plain = {name.replace("sep_bottleneck.0", "x"): array for name, array in state.items()}
    filled, report = start(plain, whole, tmp_path)
    assert_loaded(filled, variables, "backbone", "auxiliary")
    (reason,) = report.left_out
    assert reason.startswith("head (the file lacks head/decoder1/")


def sequential(path, array, **layers):
    """A name such as `aux.4.weight` for a leaf such as auxiliary/classifier/kernel."""
    leaf = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    return f"{layers['/'.join(path[1:-1])]}.{leaf.get(path[-1], path[-1])}", array


@pytest.mark.torch
@pytest.mark.parametrize("library", ["semseg", "mmseg"])
def test_heads_of_pspnet(library, tmp_path):
    fields = {"name": "pspnet", "backbone": "resnet18", "width": 8, "stem_width": 8}
    shapes = shapes_of(**fields, channels=16, auxiliary_channels=8, dropout=0.0)
    variables = random_variables(shapes)
    state = torch_state(variables, "backbone")
    if library == "semseg":
        state = renamed(state, PSPNET)
        aux = {"conv/conv": "aux.0", "conv/bn": "aux.1", "classifier": "aux.4"}
        head = {"bottleneck/conv": "cls.0", "bottleneck/bn": "cls.1", "classifier": "cls.4"}
        head |= {f"pool{i + 1}/conv": f"ppm.features.{i}.1" for i in range(4)}
        head |= {f"pool{i + 1}/bn": f"ppm.features.{i}.2" for i in range(4)}
    else:
        aux = {"conv/conv": "auxiliary_head.convs.0.conv", "conv/bn": "auxiliary_head.convs.0.bn"}
        aux["classifier"] = "auxiliary_head.conv_seg"
        head = {f"bottleneck/{part}": f"decode_head.bottleneck.{part}" for part in ("conv", "bn")}
        for i in range(4):
            for part in ("conv", "bn"):
                head[f"pool{i + 1}/{part}"] = f"decode_head.psp_modules.{i}.1.{part}"
        head["classifier"] = "decode_head.conv_seg"
    for part, layers in (("head", head), ("auxiliary", aux)):
        found = leaves_of(variables).items()
        state |= dict(sequential(p, leaf, **layers) for p, leaf in found if p[0] == part)
    filled, report = start(state, shapes, tmp_path)
    assert_loaded(filled, variables, "backbone", "head", "auxiliary")
    assert not report.left_out


@pytest.mark.torch
@pytest.mark.parametrize("layer", ["layer5.conv2d_list.", "classifier.0.convs."])
def test_heads_of_deeplab_v2(layer, tmp_path):
    fields = {"name": "deeplab_v2", "backbone": "resnet18", "width": 8, "stem": "conv7"}
    shapes = shapes_of(**fields)
    variables = random_variables(shapes)
    prefix = "" if layer.startswith("layer5") else "model.backbone."
    state = renamed(torch_state(variables, "backbone"), CONV7, prefix)
    layers = {f"aspp{i + 1}": f"{prefix.removesuffix('backbone.')}{layer}{i}" for i in range(4)}
    found = leaves_of(variables).items()
    state |= dict(sequential(p, leaf, **layers) for p, leaf in found if p[0] == "head")
    filled, report = start(state, shapes, tmp_path)
    assert_loaded(filled, variables, "backbone", "head")
    assert report.left_out == ()
    # COCO's or VOC's 21 classes are not Cityscapes' 19; and two networks must not be the same.
    twenty_one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (*x.shape[:-1], 21 if x.shape[-1] == 19 else x.shape[-1]), x.dtype
        ),
        shapes,
    )
    filled, report = start(state, twenty_one, tmp_path)
    assert_loaded(filled, variables, "backbone")
    assert report.left_out == ("head (19 classes instead of 21)",)
    filled, report = start(state, shapes, tmp_path, sharing=("a", "b"))
    assert_loaded(filled, variables, "backbone")
    assert report.left_out == ("head (so that a and b differ)",)
    assert f"{layers['aspp1']}.bias" in report.unused
    released = shapes_of(**fields, aspp_branches=2)
    filled, report = start(state, released, tmp_path)
    assert_loaded(filled, variables, "backbone", "head")
    assert f"{layers['aspp4']}.bias" in report.unused


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of classifiers: resnet18 with conv7, resnet50 with a deep stem of 8, 8, 16."""
    folder = tmp_path_factory.mktemp("files")
    for name, names, fields in (
        ("resnet18", CONV7, {"backbone": "resnet18", "stem": "conv7"}),
        ("resnet50", SEMSEG, {"backbone": "resnet50", "stem_width": 8}),
    ):
        state = torch_state(random_variables(shapes_of(**NET, **fields)), "backbone")
        safetensors.numpy.save_file(
            {k: np.ascontiguousarray(v) for k, v in renamed(state, names).items()},
            folder / f"{name}.safetensors",
        )
    return folder


@pytest.mark.torch
@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (
            "resnet18",
            {"backbone": "resnet18"},
            r"resnet18\.safetensors holds resnet18 of width 8 and stem conv7 \(8 channels\), and "
            r"the network has resnet18 of width 8 and stem deep \(4, 4, 8 channels\)\. Take other "
            r"weights, or set --config\.model\.stem=conv7$",
        ),
        (
            "resnet18",
            {"backbone": "resnet50", "stem": "conv7"},
            r"set --config\.model\.backbone=resnet18$",
        ),
        (
            "resnet50",
            {"backbone": "resnet34"},
            r"holds resnet50 .*stem deep \(8, 8, 16 channels\).* set "
            r"--config\.model\.backbone=resnet50 --config\.model\.stem_width=8$",
        ),
        (
            "resnet18",
            {"backbone": "resnet18", "stem": "conv7", "width": 16},
            r"set --config\.model\.width=8$",
        ),
        (
            "resnet18",
            {"name": "deeplab_v2", "backbone": "efficientnet_lite0"},
            r"holds resnet18 .*, and the network has efficientnet_lite0\. .* set "
            r"--config\.model\.backbone=resnet18 --config\.model\.width=8 --config\.model\.stem=co",
        ),
    ],
)
def test_another_stem_depth_or_width_says_what_to_set(files, file, fields, message):
    if fields["backbone"] != "efficientnet_lite0" and "name" not in fields:
        fields = NET | fields
    path = str(files / f"{file}.safetensors")
    with pytest.raises(UserError, match=message):
        pretrained.load({"a": {"pretrained": path, **fields}}, {"a": shapes_of(**fields)})


def small_resnet(**changes):
    """Names and shapes of a basic ResNet of one block per stage, as torchvision's, in zeros."""
    shapes = {"conv1.weight": (4, 3, 7, 7)}
    shapes |= {f"bn1.{leaf}": (4,) for leaf in NORM}
    for stage, width in enumerate((4, 8, 16, 32), 1):
        for conv, inputs in (("1", width // 2 if stage > 1 else 4), ("2", width)):
            shapes[f"layer{stage}.0.conv{conv}.weight"] = (width, inputs, 3, 3)
            shapes |= {f"layer{stage}.0.bn{conv}.{leaf}": (width,) for leaf in NORM}
        if stage > 1:
            shapes[f"layer{stage}.0.downsample.0.weight"] = (width, width // 2, 1, 1)
            shapes |= {f"layer{stage}.0.downsample.1.{leaf}": (width,) for leaf in NORM}
    shapes |= changes
    return {name: np.zeros(shape) for name, shape in shapes.items() if shape is not None}


RESNET10 = {"backbone": "resnet10", "stem": "conv7", **NET, "width": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer2.0.downsample.1.weight": (8, 4, 1, 1), "layer2.0.downsample.2.weight": (8,)},
            r"holds a ResNet-D, which averages in its shortcuts \(layer2\.0\.downsample\.1\.weight",
        ),
        ({"layer1.0.conv2.weight": (4, 1, 3, 3)}, r"holds a ResNeXt, whose 3x3 convolutions have"),
        ({"layer1.0.conv3.weight": (16, 8, 1, 1)}, r"holds a wide ResNet, whose bottlenecks"),
        (
            {"layer1.0.se.fc1.weight": (1, 4, 1, 1)},
            r"with other layers in its blocks \(layer1\.0\.se",
        ),
        (
            {"layer3.0.conv1.bias": (16,)},
            r"another network than resnet10: it also has layer3\.0\.con",
        ),
        ({"conv1.bias": (4,)}, r"another network than resnet10: it also has conv1\.bias"),
        (
            {"layer3.0.bn1.running_var": None},
            r"lacks 1 arrays of resnet10: backbone/layer3_0/bn1/var",
        ),
        (
            {"conv1.weight": (4, 3, 3, 3)},
            r"stem 3x3 \(4 channels\).* There is no such network here",
        ),
        ({"conv1.weight": None}, r"stem unknown \(\? channels\).* There is no such network here"),
        (
            {f"layer4.{i}.conv1.weight": (32, 32, 3, 3) for i in range(1, 9)},
            r"holds a ResNet of 1, 1, 1, 9 basic blocks of width 4 .* There is no such network",
        ),
        (
            {"layer4.0.conv2.weight": (32, 32, 1, 1)},
            r"does not fit: layer4\.0\.conv2\.weight \[1, 1, 32, 32\] for backbone/layer4_0/conv2",
        ),
    ],
)
def test_other_networks_are_refused_with_the_reason(changes, message, tmp_path):
    shapes = shapes_of(**RESNET10)
    _, report = start(small_resnet(), shapes, tmp_path, **RESNET10)
    assert len(report.loaded) == len(small_resnet())
    with pytest.raises(UserError, match=message):
        start(small_resnet(**changes), shapes, tmp_path, **RESNET10)


def test_files_without_a_network_or_with_several():
    def find(*prefixes):
        net = small_resnet().items()
        return torch_names.find({f"{p}{name}": array for p in prefixes for name, array in net}, "F")

    with pytest.raises(UserError, match=r"F holds no backbone that is known .* arrays are a, b\."):
        torch_names.find({"a": np.zeros(1), "b": np.zeros(1)}, "F")
    with pytest.raises(
        UserError, match=r"F holds several networks, .* begin with b1\., b2\.\. Save"
    ):
        find("b1.", "b2.")
    with pytest.raises(UserError, match=r"several networks"):
        find("model.b1.", "model.b2.")
    for mine, *others in (
        ("", "ema."),
        ("state_dict.", "state_dict_ema."),
        ("model_state.module.encoder.", "teacher_state.module.encoder."),
        ("model.", "optimizer."),
    ):
        found = find(*others, mine)
        assert (found.prefix, found.others) == (mine, tuple(others))
        assert found.arrays.keys() == {f"{mine}{name}" for name in small_resnet()}
        assert found.name_of(("backbone", "stem1", "bn", "var")) == f"{mine}bn1.running_var"
        assert found.name_of(("head", "classifier", "bias")) == ""


@pytest.mark.torch
@pytest.mark.parametrize(
    ("fields", "stem", "preprocessing"),
    [
        ({"backbone": "resnet18", "stem": "conv7"}, CONV7, "caffe"),
        ({"backbone": "resnet50", "stem": "deep"}, MMSEG, "imagenet"),
    ],
)
def test_logits_equal_pytorchs(fields, stem, preprocessing, tmp_path):
    torch, twins = pytest.importorskip("torch"), pytest.importorskip("torch_twin")
    fields = NET | fields
    shapes = shapes_of(**fields)
    torch.manual_seed(0)
    twin = twins.DeepLabV3Plus(19, **fields).eval()
    for name, array in twin.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            array.uniform_(0.5, 1.5)
    state = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    backbone = {name: array for name, array in state.items() if name.startswith("backbone.")}
    heads = mmseg_head({name: state[name] for name in state.keys() - backbone.keys()})
    file = tmp_path / "w.pth"
    saved = renamed(backbone, stem, "backbone.") | heads
    torch.save({"state_dict": {k: torch.tensor(v) for k, v in saved.items()}, "epoch": 3}, file)
    model = {"pretrained": str(file), "preprocessing": preprocessing, **fields}
    loaded, _ = pretrained.load({"a": model}, {"a": shapes})
    image = random_image((1, 33, 49))
    net = make(**fields, preprocessing=preprocessing)
    ours, _ = apply(net, batch_stats=False)(*loaded["a"], image)
    if preprocessing == "caffe":  # blue first, minus the mean, not divided
        x = torch.from_numpy(image[..., ::-1].copy())
        x = x - torch.tensor((104.008, 116.669, 122.675))
    else:
        x = torch.from_numpy(image) - torch.tensor((123.675, 116.28, 103.53))
        x = x / torch.tensor((58.395, 57.12, 57.375))
    with torch.no_grad():
        expected = twin.head(twin.backbone(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    assert expected.std() > 0.01
    np.testing.assert_allclose(ours.logits, expected, atol=1e-4)


def test_preprocessing_is_a_name():
    assert make(preprocessing="caffe").mean == (122.675, 116.669, 104.008)
    assert make(preprocessing="caffe").std == (1, 1, 1)
    assert make().mean == (123.675, 116.28, 103.53)
    assert make().std == (58.395, 57.12, 57.375)
    with pytest.raises(
        UserError, match=r"preprocessing is 'bgr'; it must be one of 'imagenet', 'c"
    ):
        make(preprocessing="bgr")


def test_efficientnet_has_its_own_colors(tmp_path):
    file = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({"_conv_stem.weight": np.zeros((32, 3, 3, 3))}, file)
    with pytest.raises(UserError, match=r'preprocessing "caffe" is for ResNets'):
        pretrained.open_weights("efficientnet_lite0", str(file), bgr=True)
    model = {"pretrained": str(file), **RESNET10}
    with pytest.raises(UserError, match=r"holds efficientnet_lite0, .*set --config\.model\.backb"):
        pretrained.load({"a": model}, {"a": shapes_of(**RESNET10)})
    model["backbone"] = "another"
    with pytest.raises(UserError, match=r"holds efficientnet_lite0, and the network has another"):
        pretrained.load({"a": model}, {"a": Variables({"backbone": {}}, {})})
