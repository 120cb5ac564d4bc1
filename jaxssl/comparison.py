"""Rules compared by the classes of the pseudo-labels that they keep: Table 5 of DARS on a run.

One of its networks labels the unlabeled images once more; all that is kept of that are counts. The
rules, and the calibrations before some of them, are those of `calibration.make_rules`. The command
is `python -m jaxssl.report --calibration`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxssl import (
    calibration,
    labeling,
    logs,
    metrics,
    phases,
    selection,
    sharding,
    startup,
    sweep,
    watch,
)
from jaxssl.calibration import Calibration, Sample, Temperature
from jaxssl.contracts import IGNORE_LABEL, DataInfo, Phase, Source, UserError
from jaxssl.data import files, loading
from jaxssl.data.pseudo_labels import Store
from jaxssl.data.splits import Split
from jaxssl.evaluate import Evaluator
from jaxssl.inference import Presentation
from jaxssl.selection import LEVELS, Aligned, TopShare
from jaxssl.trained import Trained


def compare(
    run: Trained,
    console: logs.Console,
    *,
    network: str | None = None,
    step: str | int | None = None,
    ratio: float | None = None,
    pixels: int = 200_000,
    images: int | None = None,
) -> dict[str, Any]:
    """Compares rules and calibrations by the classes that they keep, and writes calibration.json.

    What is drawn at random among pseudo-labels counts as its mean. Cross entropies and calibration
    errors are those of the validation pixels that were fitted on.

    Args:
      run: whose config says where the data are.
      console: shows the tables.
      network: that labels; None takes the first round's.
      step: "best", "last" or a number; None takes the one that it labeled at, where it is kept.
      ratio: share of the pixels to keep; None takes the first round's, or .2.
      pixels: of validation images to fit on, at most; or images, where each is labeled as a whole.
      images: unlabeled images to label, at most.

    Returns:
      What calibration.json holds.

    Raises:
      UserError: there is no such network or step, or the data do not fit the run.
    """
    for name, value in (("pixels", pixels), ("images", images)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} is too small. Give 1 or more.")
    sources = _open_sources(run)
    phase = _first_labeled(run, sources)
    first = None if phase is None else phase.labeling
    # A run that labels none shows images as it evaluates.
    shown = Presentation.of(run.config.eval, run.config.crop).uncropped
    how, rule = (shown, None) if first is None else (first.shown, first.rule)
    if ratio is None:
        ratio = rule.ratio if isinstance(rule, (Aligned, TopShare)) else 0.2
    precision = rule.precision if isinstance(rule, Aligned) else "float16"
    rules = calibration.make_rules(ratio, precision)
    network, number = _labeler(run, phase, network, step, console)
    look = _Look(run, network, number, how, sources["val"], console)
    unlabeled = loading.evenly_spaced(sources["unlabeled"], images or len(sources["unlabeled"]))
    console.message(
        f"Calibration: {network} at step {number}, {how}; up to {pixels} labels of "
        f"{len(sources['val'])} validation images, then {len(unlabeled)} unlabeled images."
    )
    sample = look.sample(sources["val"], pixels)
    fitted = calibration.fit_all(sample.logits, sample.labels)
    counts, left_out = look.count(unlabeled, fitted)
    if len(left_out) == len(unlabeled):
        raise UserError(f"No unlabeled image can be read, such as {left_out[0]}. Restore them.")
    prior = watch.class_counts(sources["labeled"])
    kept = {
        name: calibration.expected_counts(counts[by], choose(counts[by], prior))
        for name, (by, choose) in rules.items()
    }
    predicted = counts["none"].sum()
    found = {
        "network": network,
        "step": number,
        "shown": str(how),
        "images": len(unlabeled) - len(left_out),
        "left_out": sorted(left_out),
        "pixels": len(sample.keys),
        "ratio": ratio,
        "precision": precision,
        "temperature": cast(Temperature, fitted["temperature scaling"]).value,
        "calibrations": {name: _fit_json(one, sample) for name, one in fitted.items()},
        "rules": {name: _kept_json(run.info, x, predicted, prior) for name, x in kept.items()},
    }
    path = run.workdir / "report" / "calibration.json"
    files.write_json(path, found)
    console.close()  # the last bar stays above the result
    _show(found, console)
    console.message(f"Written to {path}")
    return found


class _Look:
    """One network of a run, to be shown images."""

    def __init__(
        self,
        run: Trained,
        network: str,
        step: int,
        how: Presentation,
        source: Source,
        console: logs.Console,
    ):
        variables = run.variables(network, step)
        startup.keep_compiled(run.config)
        self._run = Evaluator(
            run.nets, source, sharding.make_mesh(), run.config, say=console.message
        )
        self._seed, self._console = run.config.seed, console
        self._predict = functools.partial(
            self._run.predict, network, how, self._run.local(variables)
        )

    def sample(self, source: Source, size: int) -> Sample:
        """Logits and labels of pixels drawn from all those of a source that have a label."""
        C = source.info.num_classes
        drawn = Sample(np.zeros(0, np.uint32), np.zeros((0, C), np.float32), np.zeros(0, np.uint8))

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for batch in self._batches(source):
                if "label" not in batch:
                    raise UserError(_NO_LABELS)
                ids = (source.ids[i] if i >= 0 else "" for i in batch["index"])
                rngs = [labeling.image_rng(self._seed, image_id) for image_id in ids]
                positions, keys = calibration.draw(batch["label"], rngs, size)
                yield {**batch, "positions": positions, "keys": keys}

        @jax.jit
        def read(logits: jax.Array, positions: jax.Array) -> jax.Array:
            return jnp.take_along_axis(logits.reshape(len(logits), -1, C), positions[..., None], 1)

        def add(batch: Mapping[str, np.ndarray], logits: np.ndarray) -> None:
            nonlocal drawn
            flat = batch["label"].reshape(len(logits), -1)
            labels = np.take_along_axis(flat, batch["positions"], 1)
            known = labels != IGNORE_LABEL
            found = Sample(batch["keys"][known], logits[known], labels[known])
            drawn = drawn.merged(found, size)

        self._each(
            "validation",
            len(source),
            lambda batch: read(self._predict(batch), batch["positions"]),
            batches(),
            add,
        )
        if not len(drawn.keys):
            raise UserError(_NO_LABELS)
        return drawn

    def count(
        self, source: Source, calibrations: Mapping[str, Calibration]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """By calibration, int64 `[C,levels]`: pixels by predicted class and level of confidence;
        and which images could not be read.
        """
        C, left_out = source.info.num_classes, list[str]()
        counts = {name: np.zeros((C, LEVELS), np.int64) for name in calibrations}

        @jax.jit
        def read(calibrations: Mapping[str, Calibration], logits: jax.Array) -> Any:
            return {name: labeling.most_probable(x(logits)) for name, x in calibrations.items()}

        def add(batch: Mapping[str, np.ndarray], found: Mapping[str, Any]) -> None:
            valid = batch["valid"]
            for name, (labels, levels) in found.items():
                counts[name] += selection.count(labels[valid], levels[valid], C)

        batches = self._batches(source, lambda i, _: left_out.append(source.ids[i]))
        self._each(
            "unlabeled",
            len(source),
            lambda batch: read(calibrations, self._predict(batch)),
            batches,
            add,
        )
        return counts, left_out

    def _batches(
        self, source: Source, on_damage: Callable[[int, str], None] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        return self._run.batches(source, on_damage=on_damage)

    def _each(
        self,
        name: str,
        total: int,
        update: sweep.Update,
        batches: Iterable[Mapping[str, np.ndarray]],
        sink: sweep.Sink,
    ) -> None:
        """As `sweep.each`, over `total` images, and says how far it is."""
        done = 0

        def counting(batch: Mapping[str, np.ndarray], found: Any) -> None:
            nonlocal done
            sink(batch, found)
            done += int((batch["index"] >= 0).sum())
            self._console.step(done)

        self._console.phase(name, total, unit="images")
        with self._run.telling_compilations("Calibration"):
            sweep.each(update, batches, self._run.mesh, counting)


def _open_sources(run: Trained) -> dict[str, Source]:
    """The data that a run learned from; UserError where they changed since."""
    split, sources = phases.open_sources(run.config.data)
    stored = run.workdir / "splits.json"
    if stored.exists() and Split.from_json(stored.read_text()) != split:
        raise UserError(
            f"The images differ from those in {stored}: the data changed since the run, or are "
            "elsewhere. Say where with --config.data.root=DIR."
        )
    run.check_classes(sources["val"].info)
    if not len(sources["unlabeled"]):
        raise UserError(f"{run.workdir} has no unlabeled images: there is nothing to label.")
    return sources


def _first_labeled(run: Trained, sources: Mapping[str, Source]) -> Phase | None:
    """The first phase that learns from stored pseudo-labels, if any does."""
    planned = run.method.phases(phases.make_plan(run.config, sources))
    return next((phase for phase in planned if phase.labeling is not None), None)


def _labeler(
    run: Trained,
    phase: Phase | None,
    network: str | None,
    step: str | int | None,
    console: logs.Console,
) -> tuple[str, int]:
    """Name and step of the network to label with; see `compare`."""
    if network is None and step is None and phase is not None:
        store = Store.of(run.workdir, phase.name, run.info)
        first = store.read_summary()["labeler"] if store.complete else None
        if first is not None and first["step"] in run.kept:
            return first["network"], first["step"]
        if first is not None:
            console.message(
                f"The checkpoint that labeled before {phase.name} (step {first['step']}) is not "
                "kept any more: the run's best one takes its place."
            )
    return network or run.headline, run.step("best" if step is None else step)


def _fit_json(fitted: Calibration, sample: Sample) -> dict[str, float]:
    logits = np.asarray(fitted(jnp.asarray(sample.logits)))
    return {
        "cross_entropy": calibration.cross_entropy(logits, sample.labels),
        "calibration_error": calibration.calibration_error(logits, sample.labels),
    }


def _kept_json(
    info: DataInfo, kept: np.ndarray, predicted: int, prior: np.ndarray
) -> dict[str, Any]:
    shares = kept / max(kept.sum(), 1)
    divergence = metrics.kl_divergence(prior, kept)
    return {
        "kl": divergence if np.isfinite(divergence) else None,
        "kept": float(kept.sum() / predicted),
        "classes": dict(zip(info.classes, map(float, shares), strict=True)),
    }


def _show(found: Mapping[str, Any], console: logs.Console) -> None:
    console.table(
        f"Fitted on {found['pixels']} validation labels, T = {found['temperature']:.3f}",
        ("calibration", "cross entropy", "calibration error %"),
        [
            (name, f"{one['cross_entropy']:.4f}", f"{100 * one['calibration_error']:.2f}")
            for name, one in found["calibrations"].items()
        ],
    )
    console.table(
        f"Pseudo-labels of {found['images']} images at a ratio of {found['ratio']:g}",
        ("rule", "KL(labels || pseudo-labels)", "kept %"),
        [
            (name, "-" if one["kl"] is None else f"{one['kl']:.4f}", f"{100 * one['kept']:.1f}")
            for name, one in found["rules"].items()
        ],
    )


_NO_LABELS = (
    "The validation images have no labeled pixel, and calibrations are fitted on these. Give them "
    "labels."
)
