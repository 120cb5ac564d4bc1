"""Methods against supervised training on street scenes: same labels, student updates and network.

  python benchmarks/streets_methods.py  # all rows, seeds 0 to 3; goes on where it was
  python benchmarks/streets_methods.py --network=pretrained --updates=300+800 --seeds=0,1,2
  python benchmarks/streets_methods.py --table  # prints what is there, runs nothing
  python benchmarks/streets_methods.py --root=DIR --config.data.split=40  # on a folder of images
  python benchmarks/streets_methods.py --rows=dmt,dars,cbst --plot=FILE.png  # labels by round

A seed chooses the labeled images, the initialization and the order of the batches, so differences
to "supervised" of the same seed are paired: until its warm-up ends, student a is that run. Scores
are mIoU in percent over the classes present, of the network that the method reports (student a, or
its teacher) after the last update: none is chosen by it.
Updates are those of all phases; where two networks take turns, as in DMT, half of them are a's. MiB
is what the compiler says that a step takes.

One run is one file in benchmarks/results/, named after what its config changes and the sources that
computed it. A run that other sources computed is not repeated without --again: a new method adds
rows and repeats none. The table tells where a row's seeds come from different sources.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxssl import config as configs
from jaxssl import logs, methods, phases, trained
from jaxssl.contracts import Plan, UserError

FILE = Path(__file__).resolve()
ROOT = FILE.parents[1]
RESULTS = FILE.parent / "results"
BASELINE = "supervised"
ABLATIONS = {"mkd": "table3/", "u2pl": "table6/", "rml": "table4/"}
"""By method, the table of its paper whose rows take it apart."""
SCORES = {"miou": "mIoU", "accuracy": "accuracy"}
"""Names of a run's score and their titles; by the task it has one of them."""
SCORING = ("mode", "window", "stride", "flip", "scales")
"""Keys of `eval` that change a score."""


class Row(NamedTuple):
    """A line of the table: a family of config files of configs/, and what the row changes."""

    config: str
    overrides: Mapping[str, Any] = {}


def rows() -> dict[str, Row]:
    found = {
        BASELINE: Row("supervised"),
        "supervised_strong": Row("supervised", {"method.strong": True}),
        "supervised_all": Row("supervised", {"data.split": "all"}),
        "cps": Row("cps", {"method.cutmix": False}),
        "cps_cutmix": Row("cps"),
        "mkd": Row("mkd"),
        "dmt": Row("dmt"),
        "dst": Row("dmt", {"method.labels": "own"}),
        "cbst": Row("dmt", {"method.labels": "own", "method.weight": "none"}),
        "dars": Row("dars"),
        "st": Row("dars", {"method.rule": "st"}),
        "u2pl": Row("u2pl"),
        "rml": Row("rml"),
        "mean_teacher": Row("mean_teacher"),
        "fixmatch": Row("fixmatch"),
        "cutmix_seg": Row("cutmix_seg"),
        "dml": Row("dml"),
    }
    for method, table in ABLATIONS.items():
        for row in _load(ROOT / "configs" / f"{method}_sweep.py").get_rows():
            if row.name.startswith(table):
                found[f"{method}_{row.name.removeprefix(table)}"] = Row(method, row.overrides)
    return found


def main() -> int:
    parser = create_parser(__doc__, rows(), range(4))
    parser.add_argument("--network", choices=("scratch", "pretrained"), default="scratch")
    parser.add_argument("--budget", default="long", help="word of the configs' variants")
    parser.add_argument(
        "--updates", help="instead, as 300+800: of each student on labels alone, then in all rounds"
    )
    parser.add_argument("--root", type=Path, help="a folder of images instead of the streets")
    args = parse(parser, rows())
    results = args.results or RESULTS / (f"{args.root.name}_methods" if args.root else FILE.stem)

    def config(row: Row, seed: int) -> Any:
        changes = args.changes
        if args.updates:
            base = resolve(Row(row.config), args.network, args.budget, seed, changes, args.root)
            changes = changes | share_updates(base, args.updates)
        return resolve(row, args.network, args.budget, seed, changes, args.root)

    print(compare(args, rows(), config, results))
    return 0


def create_parser(
    description: str | None, known: Mapping[str, Row], seeds: Iterable[int]
) -> argparse.ArgumentParser:
    """The options that every comparison has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, ",".join(map(str, seeds))
    add("--rows", default=",".join(known), help="names, separated by commas")
    add("--seeds", default=default, help="numbers, separated by commas")
    add("--workdirs", type=Path, default=Path("/tmp/streets_methods"))
    add("--results", type=Path, help="default: a folder in benchmarks/results")
    add("--again", action="store_true", help="repeat what other sources computed")
    add("--table", action="store_true", help="print results, run nothing")
    add("--plot", type=Path, help="draw pseudo-labels by round, run nothing")
    return parser


def parse(parser: argparse.ArgumentParser, known: Mapping[str, Row]) -> argparse.Namespace:
    """The options of the command line, `rows` and `seeds` as lists, and what overrides the configs
    as `changes`.
    """
    args, overrides = parser.parse_known_args()
    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            parser.error(f"unexpected {override}; overrides look like --config.steps=100")
    args.changes = dict(o.removeprefix("--config.").split("=", 1) for o in overrides)
    args.rows, args.seeds = args.rows.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := set(args.rows) - known.keys():
        parser.error(f"no row {min(unknown)!r}; there are {', '.join(known)}")
    return args


def compare(
    args: argparse.Namespace,
    known: Mapping[str, Row],
    config: Callable[[Row, int], Any],
    results: Path,
) -> str:
    """Does what the options ask for with the runs of a table, and gives the table.

    Args:
      args: of `parse`.
      known: rows by name.
      config: of a row and a seed.
      results: folder of the files.
    """
    # Seed by seed: whenever it is stopped, the rows done can be compared.
    runs = distinct(
        Run(name, seed, config(known[name], seed)) for seed in args.seeds for name in args.rows
    )
    if args.plot:
        draw(runs, results).savefig(args.plot, dpi=150)
    if not (args.table or args.plot):
        for run in runs:
            measure(run, results, args.workdirs / results.name, again=args.again)
    return table(runs, results)


def labelings(workdir: Path) -> list[dict[str, Any]]:
    """What came of labeling before each phase that did, in order."""
    folder = workdir / "pseudo_labels"
    summaries = [json.loads(path.read_text()) for path in folder.glob("*/summary.json")]
    return [
        {name: one[name] for name in ("phase", "kept", "kl", "accuracy")}
        for one in sorted(summaries, key=lambda one: one["labeler"]["step"])
    ]


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """What of a config decides a result and how it is scored, as text by key; keys that it does not
    have, and fields of its method, have their defaults.
    """
    method = methods.load(config["method"])
    whole = _merged(configs.default().to_dict(), config)
    whole["method"] = {"name": config["method"]["name"], **dataclasses.asdict(method)}
    whole["scoring"] = {key: whole["eval"][key] for key in SCORING}
    lines = configs.differences({}, json.loads(json.dumps(whole)))
    return dict(line.split(": absent -> ", 1) for line in lines)


def _merged(default: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what it lacks, section by section."""
    sections = {
        key: _merged(value, config.get(key, {}))
        for key, value in default.items()
        if isinstance(value, Mapping)
    }
    return {**default, **config, **sections}


class Run(NamedTuple):
    """A row with one seed."""

    row: str
    seed: int
    config: Any

    @property
    def settings(self) -> dict[str, str]:
        """What decides the result, by key of the config."""
        return settings(self.config.to_dict())

    @property
    def digest(self) -> str:
        """Of the method and the settings that are not defaults; later versions may have more."""
        method = self.config.method.name
        default = settings({"method": {"name": method}})
        return _digest(json.dumps([method, sorted(self.settings.items() - default.items())]))

    @property
    def stem(self) -> str:
        """The name of its files, but for the sources."""
        return f"{self.row}-seed{self.seed}-{self.digest}"

    @property
    def name(self) -> str:
        """The name of the file that these sources write."""
        return f"{self.stem}-{code_version(self.config.method.name)}"

    @property
    def data(self) -> str:
        """Names the images: their names and sizes, in a folder."""
        return _fingerprint(Path(self.config.data.root)) if self.config.data.root else "embedded"

    def read(self, folder: Path) -> dict[str, Any] | None:
        """What was measured, if it was: by these sources or, failing that, last."""
        files = folder.glob(f"{self.row}-seed{self.seed}-*.json")
        found = [one for path in files if self.is_of(one := json.loads(path.read_text()))]
        mine = code_version(self.config.method.name)
        return max(found, key=lambda one: (one["code"] == mine, one["finished"]), default=None)

    def is_of(self, result: Mapping[str, Any]) -> bool:
        """Whether a result is of this computation, whatever the file is called: other versions had
        fewer keys. What the run leaves open was decided by the data.
        """
        try:
            theirs = settings(result["config"])
        except UserError:  # of a field that is no more
            return False
        return all(
            theirs.get(key) == value
            for key, value in self.settings.items()
            if value != "None" or key.startswith("method.")
        )


def distinct(runs: Iterable[Run]) -> list[Run]:
    """Without what is the same computation: the method's own config is a row of its ablations."""
    first: dict[tuple[int, str], Run] = {}
    for run in runs:
        first.setdefault((run.seed, run.digest), run)
    return list(first.values())


def measure(run: Run, results: Path, workdirs: Path, *, again: bool = False) -> None:
    """Trains a row with one seed and writes its file, unless it is there."""
    if found := run.read(results):
        if found["data"] != run.data:
            sys.exit(f"{results} is about other images: pass another --results, or --table.")
        same = found["code"] == code_version(run.config.method.name)
        if same or not again:
            print(f"{run.stem}: done before{'' if same else ', by other sources'}", flush=True)
            return
    workdir = workdirs / run.name
    print(f"{run.name}: training", flush=True)
    if code := phases.run(run.config, workdir):
        sys.exit(code)
    lines = _lines(workdir / "metrics.jsonl")
    last, name = [(line, name) for line in lines for name in SCORES if f"val/{name}" in line][-1]
    starts = _lines(workdir / "time.jsonl")
    result = {
        "row": run.row,
        "seed": run.seed,
        name: last[f"val/{name}"],
        "mode": last["eval/mode"],
        "last": {key: value for key, value in last.items() if key.startswith(("val/", "watch/"))},
        "steps": last["step"],
        "labelings": labelings(workdir),
        "training_seconds": sum(start["seconds"]["training"] for start in starts),
        "memory": max((n for start in starts for n in start["memory"].values()), default=None),
        "code": code_version(run.config.method.name),
        "data": run.data,
        "config": json.loads((workdir / "config.json").read_text()),
        "environment": {**logs.environment(), "command": shlex.join(["python", *sys.argv])},
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    results.mkdir(parents=True, exist_ok=True)
    trained.write_whole(results / f"{run.name}.json", json.dumps(result, indent=1) + "\n")


def resolve(
    row: Row,
    network: str,
    budget: str,
    seed: int,
    changes: Mapping[str, str],
    root: Path | None = None,
) -> Any:
    """The row's config on the street scenes, all of which have labels, or on a folder."""
    if root is None:
        data, words = "cityscapes", ["streets", *([budget] if budget else [])]
        given: dict[str, Any] = {"eval.unlabeled_truth": True}
    else:
        data, words = "folder", ["small"]
        given = {"data.root": str(root.absolute())}
    if network == "pretrained":
        words.append("pretrained")
    return load_config(row, data, words, seed, {**given, **changes})


def share_updates(config: Any, updates: str) -> dict[str, str]:
    """The keys that give each student of a method so many updates, such as "300+800", where `steps`
    is a main phase's, a stage's or a round's.
    """
    warmup, main = (int(part) for part in updates.split("+"))
    one_each = Plan(
        {"labeled": 1, "unlabeled": 1}, {"labeled": 1, "unlabeled": 1}, 2, steps=1, warmup=warmup
    )
    phases = methods.load(config.method).phases(one_each)
    rounds = sum(phase.steps for phase in phases if "a" in phase.train) - warmup
    return {"warmup": str(warmup), "steps": str(main // rounds)}


def load_config(
    row: Row, data: str, words: Iterable[str], seed: int, changes: Mapping[str, Any]
) -> Any:
    """A row's config, with the seed in every place that draws.

    Args:
      row: of the table.
      data: last part of the file's name.
      words: of its variant.
      seed: of the run.
      changes: values by key, or their text.
    """
    config = _load(ROOT / "configs" / f"{row.config}_{data}.py").get_config(",".join(words))
    # Panels and checkpoints cost time and change nothing; evaluated at the end alone.
    given = {"seed": seed, "data.seed": seed, "eval.panels": 0, "eval.every": 10**9}
    asked = {
        key: _value(config, key, value) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    config.update_from_flattened_dict({**given, **asked, **row.overrides})
    return config


def table(runs: Sequence[Run], folder: Path) -> str:
    """Markdown: mean and spread over seeds, and the difference to the baseline, seed by seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        if result := run.read(folder):
            found.setdefault(run.row, {})[run.seed] = result
    base, every = found.get(BASELINE, {}), [one for row in found.values() for one in row.values()]
    title = next((t for name, t in SCORES.items() if any(name in one for one in every)), "score")
    lines = [
        f"| | seeds | {title} % | minus {BASELINE} | better in | updates | time per update | MiB |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(name, results, base) for name, results in found.items()),
    ]
    for name, results in found.items():
        if len({result["code"] for result in results.values()}) > 1:
            lines += ["", f"Seeds of {name} were computed by different sources."]
    return "\n".join(lines)


def _line(name: str, runs: Mapping[int, Any], base: Mapping[int, Any]) -> str:
    scores = [_score(run) for run in runs.values()]
    paired = sorted(runs.keys() & base.keys())
    gaps = [_score(runs[seed]) - _score(base[seed]) for seed in paired]
    wins = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
    ratios = [_update_time(runs[seed]) / _update_time(base[seed]) for seed in paired]
    cost = f"{statistics.median(ratios):.1f}" if ratios else ""
    same = name == BASELINE
    updates = max(run["steps"] for run in runs.values())
    sizes = [run["memory"] for run in runs.values() if run.get("memory")]
    size = f"{max(sizes) / 2**20:.0f}" if sizes else ""
    return (
        f"| {name} | {len(scores)} | {_spread(scores)} | {'' if same else _spread(gaps, sign='+')} "
        f"| {'' if same else wins} | {updates} | {cost} | {size} |"
    )


def draw(runs: Sequence[Run], folder: Path) -> Any:
    """A figure of each row's pseudo-labels round by round: the share that is kept, and of these the
    share that is right; means over seeds. Two networks that take turns are drawn as one line.
    """
    from matplotlib.figure import Figure

    rounds: dict[str, list[list[dict[str, Any]]]] = {}
    for run in runs:
        if (result := run.read(folder)) and result.get("labelings"):
            rounds.setdefault(run.row, []).append(result["labelings"])
    if not rounds:
        sys.exit(f"No run in {folder} made pseudo-labels before a phase.")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for key, title, axis in zip(("accuracy", "kept"), ("right", "kept"), axes, strict=True):
        for name, seeds in rounds.items():
            of_round = [[one[key] for one in each] for each in zip(*seeds, strict=True)]
            known = [[v for v in values if v is not None] for values in of_round]
            means = [100 * statistics.mean(values) if values else math.nan for values in known]
            places = [1 + i * (_rounds(seeds[0]) / len(means)) for i in range(len(means))]
            axis.plot(places, means, marker="o", label=f"{name} ({len(seeds)} seeds)")
        axis.set(xlabel="round", title=f"pseudo-labels {title}, %")
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def _rounds(labelings: Sequence[Mapping[str, Any]]) -> int:
    """How many rounds there are: two networks that take turns label twice in each."""
    return len({one["phase"].removesuffix("_a").removesuffix("_b") for one in labelings})


def _score(run: Mapping[str, Any]) -> float:
    """In percent."""
    return 100 * next(run[name] for name in SCORES if name in run)


def _update_time(run: Mapping[str, Any]) -> float:
    return run["training_seconds"] / run["steps"]


def _spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{sign}.1f} ± {deviation:.1f}"


@functools.cache
def code_version(method: str) -> str:
    """Names what computed a number: every source of the package without its comments, except the
    methods that it does not import.
    """
    package = ROOT / "jaxssl"
    mine = {f"{name}.py" for name in ("__init__", "supervised", *_imported(method))}
    sources = [
        path.read_text()
        for path in sorted(package.rglob("*.py"))
        if path.parent.name != "methods" or path.name in mine
    ]
    return _digest("".join(ast.dump(_without_docstrings(source)) for source in sources))


def _imported(method: str) -> set[str]:
    """A method, and those that it imports or that these do."""
    tree = ast.parse((ROOT / "jaxssl" / "methods" / f"{method}.py").read_text())
    found = {method}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="jaxssl.methods", names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module)) if module.startswith("jaxssl.methods."):
                found.add(module.rpartition(".")[2])
    return found.union(*map(_imported, found - {method}))


def _without_docstrings(source: str) -> ast.AST:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            node.body = body[1:]  # pyright: ignore[reportAttributeAccessIssue]
    return tree


def _is_text(node: ast.AST) -> bool:
    value = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


@functools.cache
def _fingerprint(root: Path) -> str:
    """Of the names and sizes of all files below a folder."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return _digest("".join(f"{path.relative_to(root)} {path.stat().st_size}\n" for path in files))


def _value(config: Any, key: str, text: str) -> Any:
    """A command line's value, in the type that the config has there."""
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    return text if config.get_type(name) is str else ast.literal_eval(text)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
