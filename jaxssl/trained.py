"""What training left in a workdir, opened again without its data: config, classes, networks."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import NamedSharding
from ml_collections import ConfigDict, config_flags

from jaxssl import config as configs
from jaxssl import methods, models, sharding
from jaxssl.checkpoint import Checkpoints
from jaxssl.config import Config
from jaxssl.contracts import DataInfo, Method, Network, UserError, Variables
from jaxssl.state import TEACHER


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run as its newest checkpoint tells it. Holds no arrays.

    Attributes:
      workdir: of the run; opening it writes nothing.
      config: the run's, with the defaults of keys that are newer than the run.
      info: classes and palette.
      method: what was minimized.
      nets: by student.
      phases: (name, steps) of each phase, in order.
      phase: the one that the newest checkpoint belongs to.
      best: the result: the best evaluation of the headline in `phase`, {"step", "score",
        "choice", "network", "mode", "last"}, or of another phase's headline that scored higher in
        its last phase; None before the first one in `phase`.
      kept: steps whose checkpoints are there, rising; more than one.
    """

    workdir: Path
    config: Config
    info: DataInfo
    method: Method
    nets: Mapping[str, Network]
    phases: tuple[tuple[str, int], ...]
    phase: str
    best: Mapping[str, Any] | None
    kept: tuple[int, ...]

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of all networks, the headline first."""
        teachers = [TEACHER + name for name in self.method.teachers]
        others = [name for name in (*self.method.students, *teachers) if name != self.headline]
        return (self.headline, *others)

    @property
    def headline(self) -> str:
        """The network that the run's result is about."""
        return self.method.headline if self.best is None else self.best["network"]

    def net(self, network: str | None = None) -> Network:
        """The architecture of a network; a teacher has its student's."""
        return self.nets[self._known(network).removeprefix(TEACHER)]

    def step(self, step: str | int = "best") -> int:
        """The step of the run that `step` means.

        Args:
          step: "best" evaluation of the headline in the newest phase, "last", or a number.

        Raises:
          UserError: nothing was evaluated yet, or there is no checkpoint of that step.
        """
        if step == "best" and self.best is None:
            raise UserError(
                f"The phase {self.phase} in {self.workdir} was not evaluated yet, so nothing is "
                "its best. Take the newest weights with --step=last, or let it train on."
            )
        best = self.best["step"] if self.best is not None else None
        number = str({"best": best, "last": self.kept[-1]}.get(str(step), step))
        kept = {str(step): step for step in self.kept}
        if number not in kept:
            raise UserError(
                f"{self.workdir} keeps no checkpoint of step {number}. --step is best, last, or "
                f"one of {', '.join(kept)}."
            )
        return kept[number]

    def variables(self, network: str | None = None, step: str | int = "best") -> Variables:
        """Reads one network and nothing else, onto all devices of this machine.

        Args:
          network: a student ("a") or a teacher ("teacher_a"); None takes the headline.
          step: as `Trained.step` takes it.

        Raises:
          UserError: there is no such network or step, or its files are damaged.
        """
        name, number = self._known(network), self.step(step)
        everywhere = sharding.replicated(sharding.make_mesh())
        with Checkpoints(self.workdir / "checkpoints", read_only=True) as checkpoints:
            size = tuple(self.config.crop)
            return read_network(checkpoints, number, name, self.net(name), size, everywhere)

    def check_classes(self, info: DataInfo) -> None:
        """UserError where data have other classes than those that the run learned."""
        if info.classes != self.info.classes:
            raise UserError(
                f"The data have the classes {', '.join(info.classes)}, but {self.workdir} was "
                f"trained on {', '.join(self.info.classes)}."
            )

    def _known(self, network: str | None) -> str:
        name = network or self.headline
        if name not in self.networks:
            raise UserError(
                f"There is no network {name!r} in {self.workdir}. There are: "
                f"{', '.join(self.networks)}."
            )
        return name


def open_trained(workdir: str | Path, overrides: Mapping[str, Any] | None = None) -> Trained:
    """Opens a workdir to use its networks, be it finished or still training.

    Args:
      workdir: of a training run.
      overrides: config keys to see otherwise, such as {"eval.mode": "slide"}; values as on a
        command line or as they are.

    Raises:
      UserError: there is no run or no checkpoint in it, a file in it does not read, or an override
        names no key.
    """
    path = Path(workdir).expanduser().absolute()
    config = _overridden(_read_config(path), overrides or {})
    configs.check(config)
    info, method = read_classes(path), methods.load(config.method)
    nets = {
        name: models.load(configs.model_of(config, name), info.num_classes)
        for name in method.students
    }
    newest, kept = None, ()
    if (path / "checkpoints").is_dir():
        with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
            newest, kept = checkpoints.latest(), checkpoints.steps()
    if newest is None:
        raise UserError(f"There is no checkpoint in {path} yet. Let the run save one first.")
    _, meta = newest
    return Trained(
        workdir=path,
        config=config,
        info=info,
        method=method,
        nets=nets,
        phases=tuple((name, steps) for name, steps in meta["phases"]),
        phase=meta["phase"],
        best=_best(meta["best"], meta["phase"]),
        kept=kept,
    )


def results(best: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The best evaluation of each reported network in the last phase that reports it.

    Args:
      best: by phase, in order, as `Run.best`.
    """
    return {record["network"]: record for record in best.values()}


def earlier(best: Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]] | None:
    """The best phase and its evaluation, where no result comes up to it: the run got worse since.

    Args:
      best: by phase, in order, as `Run.best`.
    """
    newest = [*best.values()][-1].get("mode")  # scores of other modes do not compare
    found = {phase: one for phase, one in best.items() if one.get("mode") == newest}
    phase, record = max(found.items(), key=lambda item: item[1]["choice"])
    reached = max(one["choice"] for one in results(found).values())
    return (phase, record) if record["choice"] > reached else None


def _best(best: Mapping[str, Mapping[str, Any]], phase: str) -> Mapping[str, Any] | None:
    """The best of all results; scores of other modes than the newest phase's do not compare."""
    if phase not in best:
        return None
    modes = (one for one in results(best).values() if one.get("mode") == best[phase].get("mode"))
    return max(modes, key=lambda one: one["choice"])


def read_network(
    checkpoints: Checkpoints,
    step: int,
    network: str,
    net: Network,
    size: tuple[int, int],
    where: NamedSharding,
) -> Variables:
    """Reads one network's arrays from a checkpoint of the whole state.

    Args:
      checkpoints: of the run.
      step: of the checkpoint.
      network: a student ("a") or a teacher ("teacher_a").
      net: its architecture, which gives the shapes.
      size: (height, width) of the images it was made for.
      where: devices to put the arrays on.
    """
    prefix = TEACHER if network.startswith(TEACHER) else ""
    student = network.removeprefix(TEACHER)
    shapes = jax.eval_shape(functools.partial(net.init, size=size), jax.random.key(0))
    shapes = sharding.abstract(shapes, where)
    return Variables(
        checkpoints.restore_part(step, (f"{prefix}params", student), shapes.params),
        checkpoints.restore_part(step, (f"{prefix}stats", student), shapes.stats),
    )


def evaluation_path(workdir: Path, step: int) -> Path:
    """Where `Evaluation.to_json` of networks that classify whole images stands, by name."""
    return workdir / "evaluations" / f"{step:07d}.json"


def has_begun(workdir: Path) -> bool:
    """Whether a run logged, labeled or saved anything in a workdir, which another one would mix
    with.
    """
    logged = (workdir / "metrics.jsonl").exists() or (workdir / "pseudo_labels").exists()
    return logged or any((workdir / "checkpoints").glob("[0-9]*"))


def write_classes(workdir: Path, info: DataInfo) -> None:
    """Writes `classes.json`, which says what the labels of a run mean."""
    write_whole(workdir / "classes.json", json.dumps(dataclasses.asdict(info), indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once: other processes may be reading it, and this one may be killed."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def read_classes(workdir: Path) -> DataInfo:
    """Reads `classes.json`; UserError where it is missing or damaged."""
    path = workdir / "classes.json"
    stored = _read_json(
        path, "The workdir is of an older version: start its training command once more."
    )
    try:
        return DataInfo(
            classes=tuple(stored["classes"]),
            palette=tuple((r, g, b) for r, g, b in stored["palette"]),
            task=stored["task"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Start the training once more.") from error


def _read_config(workdir: Path) -> Config:
    """The config of a run. JSON turned its tuples into lists."""
    stored = _tuples(
        _read_json(
            workdir / "config.json", "Give the --workdir of a training run (python -m jaxssl.main)."
        )
    )
    defaults = configs.default()
    for section, student in {"model": None, "model_a": "a", "model_b": "b"}.items():
        if name := stored.get(section, {}).get("name"):
            configs.use_network(defaults, name, student=student)
    return ConfigDict(_merged(defaults.to_dict(), stored))


def _read_json(path: Path, advice: str) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"There is no {path}. {advice}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. {advice}") from error


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _merged(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, and `defaults` where they say nothing."""
    both = {
        key: _merged(defaults[key], value)
        for key, value in values.items()
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
    }
    return {**defaults, **values, **both}


def _overridden(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The config with some keys set as `--config.KEY=VALUE` would set them."""
    for key, value in overrides.items():
        argv, values = ["", f"--config.{key}={value}"], flags.FlagValues()
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
            values(argv)
        except (AttributeError, LookupError, TypeError, ValueError, flags.Error) as error:
            raise UserError(f"--config.{key}={value}: {configs.reason(error)}") from error
        config = values["config"].value
    return config
