"""The types that every part of the library shares.

An experiment is a tuple of phases. A phase may sweep over the data first, then trains. A training
step is a pure function of arrays, and a `Method` says what its networks learn from. Nothing here
imports jax, so that the data pipeline and its worker processes can use these types too.

Shapes: B, H, W, C are batch, height, width and classes. Images are `[B,H,W,3]`, labels
`[B,H,W]`; for classification labels are `[B]` and everything else is the same.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NotRequired,
    Protocol,
    TypeAlias,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    import jax
    import numpy as np

    from jaxssl.inference import Presentation
    from jaxssl.state import TrainState

IGNORE_LABEL = 255
"""The label of a pixel (or image) that no loss and no metric counts."""

Task: TypeAlias = Literal["segmentation", "classification"]
"""A label per pixel, or one per image."""

Params: TypeAlias = Any
"""A tree of parameter arrays; its top-level key "backbone" holds all that is not the head."""

Stats: TypeAlias = Any
"""A tree of BatchNorm running statistics."""

Batch: TypeAlias = Mapping[str, Mapping[str, "jax.Array"]]
"""Stream name -> arrays of one global batch.

`image` uint8 `[B,H,W,3]`; `valid` bool `[B,H,W]`, False where a crop was padded (absent for
classification); `label` uint8 `[B,H,W]` where the stream has labels; `confidence` float32 `[B,H,W]`
in [0,1] where they are pseudo-labels; `index` int32 `[B]`, the image's position in the sorted ids
of its stream.
"""

Metrics: TypeAlias = Mapping[str, tuple["jax.Array", "jax.Array"]]
"""Name -> (sum, count): the value over several steps is the sum of sums over the sum of counts."""


class UserError(Exception):
    """A mistake that its reader can mend; shown as one message without a traceback, exit code 2.

    The message says what is wrong, where, and what to do.
    """


class UnreadableError(UserError):
    """A file is missing, truncated or not an image. Training puts another image in its place;
    every other mistake in the data ends it.
    """


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What the labels of a data set mean.

    Attributes:
      classes: names; position = label.
      palette: one RGB color per class, each 0 to 255.
      task: what a label is of.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    task: Task = "segmentation"

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.classes)


class Record(TypedDict):
    """One image as a `Source` gives it.

    `image` uint8 `[h,w,3]`; `label` uint8 `[h,w]` (or a class id), 255 = ignore, only where the
    source was opened with labels; `confidence` float32 `[h,w]` in [0,1] only where these are
    pseudo-labels; `id` unique within the source; `file` the path of the image,
    where it has a file of its own.
    """

    image: np.ndarray
    label: NotRequired[np.ndarray]
    confidence: NotRequired[np.ndarray]
    id: str
    file: NotRequired[str]


class Source(Protocol):
    """Random access to images and labels on disk, in an archive, or in memory. Cheap to pickle.

    `ids` are sorted. A source made without labels never opens a label file. One may have `note`, a
    line about its labels that a run prints and stores.
    """

    info: DataInfo
    ids: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Outputs(NamedTuple):
    """What a network computes from a batch of images.

    Attributes:
      logits: float32 `[B,h,w,C]` at the head's stride (`[B,C]` for classification).
      features: `[B,h,w,D]`, the input of the classifier.
      embedding: `[B,h,w,E]`, a representation head's output, where the network has one.
      auxiliary: float32 `[B,h',w',C]`, logits of an auxiliary head, where the network has one and
        statistics of the batch are in use (it serves training only).
    """

    logits: jax.Array
    features: jax.Array | None = None
    embedding: jax.Array | None = None
    auxiliary: jax.Array | None = None


class Variables(NamedTuple):
    """Everything that `Network.apply` needs of one network."""

    params: Params
    stats: Stats


class Network(Protocol):
    """An architecture with its preprocessing. Holds no arrays; hashable, and equal to another one
    alike.
    """

    def init(self, key: jax.Array, size: tuple[int, int]) -> Variables:
        """Draws parameters for images of `size` (height, width)."""
        ...

    def apply(
        self,
        params: Params,
        stats: Stats,
        image: jax.Array,
        *,
        valid: jax.Array | None = None,
        batch_stats: bool,
        key: jax.Array | None = None,
    ) -> tuple[Outputs, Stats]:
        """Runs the network.

        Args:
          params: as made by `init`.
          stats: running statistics.
          image: uint8 or float `[B,H,W,3]` in [0,255].
          valid: bool `[B,H,W]`; where False the network sees its own mean color.
          batch_stats: True normalizes with the batch's statistics and returns updated running ones,
            False normalizes with `stats` and returns them unchanged.
          key: turns on dropout and stochastic depth.
        """
        ...

    def classifier(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """The last 1x1 convolution, as kernel `[D,C]` and bias `[C]`; UserError where there is
        none.
        """
        ...

    def resize(self, logits: jax.Array, size: tuple[int, ...]) -> jax.Array:
        """Bilinear `[B,h,w,C]` -> `[B,*size,C]` by the network's own align_corners convention."""
        ...


class Weights(NamedTuple):
    """Names weights of an earlier phase: the network as it was at the phase's `last` or `best`
    step.

    `network` is a student ("a") or the teacher of one ("teacher_a").
    """

    phase: str
    network: str
    which: Literal["last", "best"] = "last"


class Selection(NamedTuple):
    """Which pseudo-labels are kept: by class, from which confidence on, and how many of those.

    Attributes:
      lowest: int64 `[C]`, the lowest level of confidence that is kept (see `selection`).
      share: float64 `[C]` in [0,1], of the positions at or above it; which ones is drawn.
    """

    lowest: np.ndarray
    share: np.ndarray


class Rule(Protocol):
    """Says from the confidences of a whole image set which pseudo-labels to keep."""

    def __call__(self, counts: np.ndarray, prior: np.ndarray) -> Selection:
        """Pure.

        Args:
          counts: int64 `[C,levels]`, positions by predicted class and level of confidence.
          prior: int64 `[C]`, positions by class in the ground truth of the labeled images.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Labeling:
    """Pseudo-labels of all images of a stream, made before a phase trains and kept on disk.

    Attributes:
      network: that labels.
      rule: which labels are kept; the others become 255.
      shown: how images are shown to the network.
      temperature: divides the logits before the softmax whose maximum is the confidence.
      seed: of the draws among kept labels, together with the image's id.
      confidence: whether batches hold it too; a method that ignores it saves decoding it.
    """

    network: Weights
    rule: Rule
    shown: Presentation
    temperature: float = 1.0
    seed: int = 0
    confidence: bool = True


@dataclasses.dataclass(frozen=True)
class Stream:
    """An endless, shuffled sequence of batches; a batch holds it under `name`.

    Attributes:
      name: "labeled" or "unlabeled": which images.
      batch: images in the global batch.
      labels: "truth"; None, and no label file is opened; or how a network labels the images before
        the phase, and then batches hold `label` and, if it says so, `confidence`.
      part: the share of the images to use, as (begin, end) of their seeded order: difference
        maximized sampling.
      augment: settings of the host's augmentation that this stream changes, such as `{"scale":
        (0.4, 2.5)}`.
    """

    name: str
    batch: int
    labels: Literal["truth"] | Labeling | None = "truth"
    part: tuple[float, float] = (0.0, 1.0)
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Sweep(Protocol):
    """One pass over a set of images before a phase trains, that makes arrays of the method's own:
    prototypes, say.

    A frozen dataclass with these three fields and two functions is one.
    """

    @property
    def name(self) -> str:
        """Of the sweep; unique in its phase."""
        ...

    @property
    def source(self) -> str:
        """Which images to pass over, "labeled" or "unlabeled"; each once."""
        ...

    @property
    def networks(self) -> Mapping[str, Weights]:
        """The networks that `update` sees, by the name it uses for them."""
        ...

    def update(
        self,
        nets: Mapping[str, Network],
        networks: Mapping[str, Variables],
        extra: Mapping[str, Any],
        batch: Mapping[str, jax.Array],
    ) -> Any:
        """Pure: what a batch adds to the sums, a tree of arrays; rows of `index` -1 are padding."""
        ...

    def finish(self, sums: Mapping[str, Any], extra: Mapping[str, Any]) -> Mapping[str, Any]:
        """The method's `extra` as the phase starts with it.

        Args:
          sums: by sweep, those of this one and of the phase's earlier ones, over all images and
            processes; NumPy arrays, int64 or float64, which no data set overflows.
          extra: as it was.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training in which one set of networks learns from one set of streams.

    Attributes:
      name: unique in the run; the method's `loss` looks at it.
      steps: optimizer updates.
      train: students that learn. The others stay as they are.
      streams: what a batch holds.
      start: networks that begin with weights of an earlier phase. The others go on as they are.
      reinitialize: students that begin from new random or pretrained weights.
      frozen: read-only networks that `loss` sees under these names.
      optimizer: "fresh" clears momentum, "continue" keeps it.
      learning_rate: base rate; None takes the config's.
      schedule: (updates the schedule has behind it when the phase starts, updates it covers); None:
        (0, steps).
      sweeps: what to run first, in order; before that, streams are labeled.
      headline: network whose score decides what is best; None takes the method's.
    """

    name: str
    steps: int
    train: tuple[str, ...]
    streams: tuple[Stream, ...]
    start: Mapping[str, Weights] = dataclasses.field(default_factory=dict)
    reinitialize: tuple[str, ...] = ()
    frozen: Mapping[str, Weights] = dataclasses.field(default_factory=dict)
    optimizer: Literal["fresh", "continue"] = "fresh"
    learning_rate: float | None = None
    schedule: tuple[int, int] | None = None
    sweeps: tuple[Sweep, ...] = ()
    headline: str | None = None

    @property
    def pseudo_labeled(self) -> Stream | None:
        """The stream whose labels a network makes before the phase; one at most."""
        found = [stream for stream in self.streams if isinstance(stream.labels, Labeling)]
        if len(found) > 1:
            raise ValueError(f"The phase {self.name} has {len(found)} pseudo-labeled streams.")
        return found[0] if found else None

    @property
    def labeling(self) -> Labeling | None:
        """How that stream is labeled."""
        labels = self.pseudo_labeled and self.pseudo_labeled.labels
        return labels if isinstance(labels, Labeling) else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a method plans its phases from.

    Attributes:
      sizes: images per stream name.
      batch: images of a global batch, per stream name.
      num_classes: C.
      steps: updates of the main phase, or None where `epochs` decides.
      epochs: passes over a stream's images, or None where `steps` decides.
      warmup: supervised updates before the method starts.
      crop: height and width of training images, for labeling by windows of that size; None where
        the images are not cropped.
      scale: bounds of the factor that training images are resized by.
      seed: of the run, for labeling that draws at random.
    """

    sizes: Mapping[str, int]
    batch: Mapping[str, int]
    num_classes: int
    steps: int | None = None
    epochs: float | None = None
    warmup: int = 0
    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    seed: int = 0

    def streams(
        self, labels: Labeling | None = None, *, augment: Mapping[str, Any] | None = None
    ) -> tuple[Stream, Stream]:
        """Labeled images, and unlabeled ones with such labels, in the plan's batches."""
        labeled, unlabeled = self.batch["labeled"], self.batch["unlabeled"]
        augment = augment or {}
        return (
            Stream("labeled", labeled, augment=augment),
            Stream("unlabeled", unlabeled, labels=labels, augment=augment),
        )

    def main_steps(self, stream: str) -> int:
        """Updates of the main phase, an epoch being one pass over `stream`."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise UserError("The config has neither steps nor epochs. Set one: --config.steps=N.")
        return max(1, round(self.epochs * self.sizes[stream] / self.batch[stream]))

    def joint_batch(self, images: int) -> int:
        """As many images as all streams have in a batch, halved until `images` suffice for one."""
        batch = sum(self.batch.values())
        while batch > max(1, images):
            batch //= 2
        return batch


class Aux(NamedTuple):
    """What `Method.loss` returns beside the loss.

    Attributes:
      stats: new running statistics, by student; the others keep theirs.
      teacher_stats: new running statistics, by teacher; used where `Method.teacher_stats` is "own".
      extra: the method's own arrays for the next step.
      metrics: what to log.
    """

    stats: Mapping[str, Stats]
    teacher_stats: Mapping[str, Stats]
    extra: Mapping[str, Any]
    metrics: Metrics


class Bounds(NamedTuple):
    """The finite numbers that a field of a method takes, as a part of its type:
    `Annotated[float, Bounds(0, 1)]`.

    Attributes:
      low: the least.
      high: the most.
      without: bounds that are left out themselves.
    """

    low: float = 0
    high: float = math.inf
    without: tuple[float, ...] = ()

    def contain(self, value: float) -> bool:
        """Whether it is one of them."""
        inside = self.low <= value <= self.high and math.isfinite(value)
        return inside and value not in self.without

    def __str__(self) -> str:
        above = f"above {self.low}" if self.low in self.without else f"from {self.low}"
        if self.high == math.inf:
            return above if self.low in self.without else f"{above} on"
        return f"{above} to {'below ' if self.high in self.without else ''}{self.high}"


Share: TypeAlias = Annotated[float, Bounds(0, 1)]
"""Of a whole; also a probability."""

NonNegative: TypeAlias = Annotated[float, Bounds(0)]
"""Such as the weight of a loss."""

Positive: TypeAlias = Annotated[float, Bounds(0, without=(0,))]
"""Such as a temperature."""

Count: TypeAlias = Annotated[int, Bounds(1)]
"""One or more."""


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """What the networks learn from. Fields are hyper-parameters, and their types say which words
    (`Literal`) and numbers (`Bounds`) they take. Nothing else is stored.

    `tasks` is what a method can learn; one that looks at pixels says so.

    A teacher is the moving average of the student of the same name. `teacher_stats` says what its
    running statistics are: "ema" averages them like parameters, "copy" takes the student's, "own"
    takes those that its forward pass in `loss` computed.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("segmentation", "classification")

    @property
    @abc.abstractmethod
    def students(self) -> tuple[str, ...]:
        """Networks with gradients."""

    @property
    def teachers(self) -> tuple[str, ...]:
        """Students that have a teacher."""
        return ()

    @property
    def headline(self) -> str:
        """The network that is evaluated while training and reported: "a", or "teacher_a"."""
        return self.students[0]

    @property
    def labeler(self) -> str | None:
        """The network whose pseudo-labels teach the headline's student; None where nothing does."""
        return None

    teacher_stats: Literal["ema", "copy", "own"] = dataclasses.field(default="ema", kw_only=True)

    def __post_init__(self) -> None:
        """Refuses words that a field does not know, and numbers outside its bounds."""
        for field, kind in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, field)
            words = get_args(kind) if get_origin(kind) is Literal else ()
            if words and value not in words:
                raise UserError(
                    f"Unknown method.{field} {value!r}. There are: {', '.join(map(str, words))}."
                )
            numbers = value if isinstance(value, tuple) else (value,)
            bounds = _bounds(kind)
            if bounds and not all(n is None or bounds.contain(n) for n in numbers):
                raise UserError(f"method.{field}={value} is no number {bounds}.")

    @abc.abstractmethod
    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        """The run, in order."""

    def notes(self, num_classes: int) -> tuple[str, ...]:
        """Lines for the user, printed before the run: where the data make the method do otherwise
        than its fields say.
        """
        del num_classes
        return ()

    def init_extra(
        self, nets: Mapping[str, Network], params: Mapping[str, Params]
    ) -> dict[str, Any]:
        """Arrays that the method keeps between steps, as a run starts with them."""
        del nets, params
        return {}

    def ema_decay(self, phase: Phase, k: jax.Array) -> jax.Array | float:
        """Share of its old value that a teacher keeps at update k = 0, 1, ... of the phase."""
        del phase, k
        return 0.0

    @abc.abstractmethod
    def loss(
        self,
        nets: Mapping[str, Network],
        params: Mapping[str, Params],
        state: TrainState,
        frozen: Mapping[str, Variables],
        batch: Batch,
        key: jax.Array,
        *,
        phase: Phase,
        progress: jax.Array,
    ) -> tuple[jax.Array, Aux]:
        """The scalar to minimize in `params`, float32.

        Args:
          nets: architectures, by student.
          params: by student; gradients are taken in those of `phase.train`.
          state: everything else a step starts with; no gradient flows into it.
          frozen: the phase's read-only networks.
          batch: the phase's streams.
          key: this step's randomness.
          phase: static, so that Python may branch on it.
          progress: steps of the phase behind it / steps of the phase, traced, in [0,1).
        """

    def reduce_extra(
        self, before: Mapping[str, Any], after: Mapping[str, Any], axis_name: str
    ) -> Mapping[str, Any]:
        """One `extra` of those that devices made from their parts of the batch, inside `jax.pmap`.

        By default the mean of floats, and of integers the largest, so that a count of steps stays
        one. Where neither means anything, as for a memory bank, a method says what does.

        Args:
          before: `extra` as all devices had it before the step.
          after: as this device's `loss` left it.
          axis_name: of the devices.

        Returns:
          The same on every device, with shapes and dtypes of `after`.
        """
        import jax  # not with the module: the pipeline's workers import that

        del before

        def reduced(x: jax.Array) -> jax.Array:
            floating = jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
            return (jax.lax.pmean if floating else jax.lax.pmax)(x, axis_name)

        return jax.tree.map(reduced, dict(after))

    def pseudo_labels(
        self,
        logits: jax.Array,
        *,
        valid: jax.Array | None = None,
        progress: jax.Array | float = 1.0,
    ) -> jax.Array:
        """What the method would teach from these logits: uint8 `[...]`, 255 where it teaches
        nothing.

        Shown in panels and measured where the truth is known.

        Args:
          logits: `[...,C]`.
          valid: bool `[...]`, where they are of an image, for a method that compares pixels; None:
            everywhere. Elsewhere the result means nothing.
          progress: of the phase, in [0,1].
        """
        del valid, progress
        return logits.argmax(-1).astype("uint8")


def _bounds(kind: Any) -> Bounds | None:
    """Of a type, of what it may be None instead of, or of the items of a tuple."""
    found = (part for part in getattr(kind, "__metadata__", ()) if isinstance(part, Bounds))
    return next(found, None) or next(filter(None, map(_bounds, get_args(kind))), None)
