"""What holds for several methods, and how they are found by name."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Linear, make_state, plan, random_batch

from jaxssl import config as configs
from jaxssl import methods, phases, sharding
from jaxssl.contracts import UserError

SIZE = (16, 24)
PASSES = {
    "mean_teacher": ["a, dropout", "a, dropout", "teacher"],
    "cutmix_seg": ["a, dropout", "a, dropout", "teacher"],
    "fixmatch": ["a, dropout", "a", "a, dropout"],
    "dml": ["a, dropout", "b, dropout", "a, dropout", "b, dropout"],
}


@dataclasses.dataclass(frozen=True)
class Recorded(Linear):
    """Writes down whose parameters run, and whether with dropout."""

    calls: list = dataclasses.field(default_factory=list, hash=False)

    def apply(self, params, *args, key=None, **kwargs):
        self.calls.append((params, key is not None))
        return super().apply(params, *args, key=key, **kwargs)


def loss_of(method, nets, state, batch):
    phase, key = method.phases(plan(images=len(batch["labeled"]["image"])))[-1], jax.random.key(0)
    zero = jnp.zeros(())
    return method.loss(nets, state.params, state, {}, batch, key, phase=phase, progress=zero)


@pytest.mark.parametrize("name", PASSES)
def test_forward_passes(name):
    method, calls = methods.load({"name": name}), []
    nets = {student: Recorded(calls=calls) for student in method.students}
    state = make_state(method, nets)
    loss_of(method, nets, state, random_batch())
    owners = {id(params): student for student, params in state.params.items()}
    found = [f"{owners.get(id(p), 'teacher')}{', dropout' * noisy}" for p, noisy in calls]
    assert found == PASSES[name]


@pytest.mark.parametrize("name", PASSES)
def test_losses_are_those_of_the_global_batch(name):
    """Eight devices, of whose images some are padded, and one."""
    method, batch = methods.load({"name": name, "weight": 2.0}), random_batch(images=8)
    nets, found = {student: Linear() for student in method.students}, []
    state = make_state(method, nets)
    for devices in (1, 8):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        everywhere, rows = sharding.replicated(mesh), sharding.batched(mesh)
        step = jax.jit(
            lambda state, batch: loss_of(method, nets, state, batch),
            in_shardings=(everywhere, rows),
        )
        found.append(step(state, batch))
    jax.tree.map(
        lambda one, all: np.testing.assert_allclose(one, all, rtol=1e-4, atol=1e-6), *found
    )
    assert found[0][1].metrics["loss_supervised"][0] < found[0][0]


MINE = """
import dataclasses

from jaxssl.methods import supervised


@dataclasses.dataclass(frozen=True)
class Method(supervised.Method):
    temperature: float = 1.0
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules of other people's, on the path."""
    folder = tmp_path / "their_methods"
    folder.mkdir()
    (folder / "warm.py").write_text(MINE)
    (folder / "empty.py").write_text("Method = dict\n")
    (folder / "broken.py").write_text("import a_package_that_is_not_there\n")
    (folder / "wrong.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "their_methods"]:
        del sys.modules[name]


def test_a_method_may_stand_outside_the_package(modules):
    method = methods.load({"name": "their_methods.warm", "temperature": 2.0, "strong": True})
    assert (method.temperature, method.strong, method.students) == (2.0, True, ("a",))
    assert method == methods.load({"name": "their_methods.warm", **dataclasses.asdict(method)})
    with pytest.raises(UserError, match=r"'their_methods.warm' has no field 'heat'.*temperature"):
        methods.load({"name": "their_methods.warm", "heat": 2.0})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mkt", r"Unknown method.name 'mkt'. There are: cps, .*mkd, .*a dot in its name"),
        ("", "Unknown method.name ''"),
        (".warm", "Unknown method.name '.warm'"),
        ("their_methods.cold", r"no module 'their_methods.cold'.*PYTHONPATH.*workdir is opened"),
        ("theirs.warm", r"no module 'theirs.warm'.*where the folder theirs is"),
        ("their_methods/warm.py", "no module 'their_methods/warm.py'"),
        ("warm.py", "no module 'warm.py'"),
        ("their_methods.empty", r"empty.py has no class Method\(contracts.Method\)"),
        ("os.path", r"has no class Method"),
    ],
)
def test_what_is_no_method_is_told(name, words, modules):
    with pytest.raises(UserError, match=words):
        methods.load({"name": name})


@pytest.mark.parametrize(
    ("module", "error"), [("broken", ModuleNotFoundError), ("wrong", ZeroDivisionError)]
)
def test_mistakes_inside_a_module_stay_what_they_are(module, error, modules):
    with pytest.raises(error):
        methods.load({"name": f"their_methods.{module}"})


@pytest.mark.parametrize(
    ("method", "network", "words"),
    [
        ("mkd", "mlp", "is for segmentation, and the data are for classification. Methods for"),
        ("supervised", "pspnet", "'pspnet' is for segmentation, .* to one of: classifier, mlp"),
    ],
)
def test_what_reads_pixels_refuses_whole_images(method, network, words):
    config = configs.default()
    with config.unlocked():
        config.data.update(name="digits", split="20", size=8)
    config.update(crop=(8, 8), steps=1)
    configs.use_network(config, network)
    _, sources = phases.open_sources(config.data)
    config.method.name = method
    with pytest.raises(UserError, match=words):
        phases.assemble(config, methods.load({"name": method}), sources, sharding.make_mesh())
