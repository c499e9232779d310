"""What a table of accuracies is made of: images, networks, rows, and what they should show; read from YAML.

A protocol is one file in `protocols/`. Every row of its table is a pipeline that runs on the same network, the same
images in the same order, with the same seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...ir.errors import OptionError
from ...passes import pipeline
from ...passes.options import InvalidOptionError, Options
from ...passes.pipeline import Pipeline
from ...passes.prune.criteria import Criterion
from ...passes.yaml_file import parse_yaml

PROTOCOLS = Path(__file__).with_name("protocols")
PIPELINES = Path(pipeline.__file__).with_name("pipelines")
BASE = "base"


class _Passes(Options):
    """Anything that runs a pipeline."""

    passes: tuple[str | dict[str, Any], ...] = ()
    """Passes as in a pipeline file."""

    @field_validator("passes")
    @classmethod
    def _known(cls, passes: tuple[Any, ...]) -> tuple[Any, ...]:
        Pipeline(passes)
        return passes


class Images(Options):
    """The images of a table."""

    data: Literal["cifar10-jpeg", "fashion-mnist"] = "cifar10-jpeg"
    """`cifar10-jpeg` are the image folders given by `--images`; `fashion-mnist` the four IDX files."""
    train: Annotated[int, Field(ge=1)] | None = None
    """Training images, a fixed random choice; all if none."""
    test: Annotated[int, Field(ge=1)] | None = None
    """Test images, the first ones; all if none."""
    calibration: Annotated[int, Field(ge=1)] = 2048
    """Training images without augmentation, for statistics."""
    validation: Annotated[int, Field(ge=0)] = 0
    """Training images that are not trained on: what `data.val` is, for passes that decide by it. 0: the test images,
    in tables whose passes decide nothing by them."""
    epoch: Annotated[int, Field(ge=1)] | None = None
    """Training images in an epoch, each time another random choice; all if none."""
    batch: Annotated[int, Field(ge=1)] = 128
    augment: bool = True
    """Shift by up to 4 pixels and mirror at random, the same in every row of a seed."""


class Network(_Passes):
    """A network and how it is trained before the rows begin."""

    network: Literal["resnet20", "resnet56", "vgg-small"]
    weights: str | None = None
    """State dict in the folder given by `--weights`; random ones, by the seed, if none."""
    width: Annotated[float, Field(gt=0)] = 1.0
    """Factor of all widths, `vgg-small` only."""
    each_seed: bool = False
    """Train one for every seed of the table, instead of one for all."""


class Cut(Options):
    """How much the peer may leave."""

    macs: Annotated[float, Field(gt=0, le=1)]


class Case(_Passes):
    """One row of the table."""

    name: str
    pipeline: str | None = None
    """Instead of passes: one of the pipelines that come with fxpress, as it is."""
    model: str | None = None
    """The network to work on, if it is another than the other rows'."""
    after: str | None = None
    """A row whose result is what the passes work on, instead of a network."""
    peer: Cut | None = None
    """Cut with Torch-Pruning's group norm pruner before the passes."""
    record: bool = True
    """Ask the teacher once for each batch and keep its answer for the other rows; not with features of the teacher."""

    @model_validator(mode="after")
    def _one_start(self) -> Case:
        if self.after is not None and (self.model or self.peer):
            raise InvalidOptionError(f"{self.name!r} goes on from {self.after!r} and can have no 'model' or 'peer'")
        return self

    @property
    def steps(self) -> Pipeline:
        """What runs."""
        return Pipeline.load(PIPELINES / f"{self.pipeline}.yaml") if self.pipeline else Pipeline(self.passes)


class Goal(Options):
    """`row` is better than `than` by at least `by` points (percent of the images), negative: not worse by more."""

    row: str
    than: str = BASE
    """Another row, or `base`: the network before the passes."""
    by: float = 0.0
    recovers: float | None = None
    """Instead: the share of the loss of `than` against the base that the row makes good."""
    metric: Literal["accuracy", "ratio_error", "ratio_rank"] = "accuracy"
    """`ratio_error` is better when it is lower."""


class Correlation(Options):
    """Instead of rows: how criteria rank channels, against the change of the loss when each is removed."""

    criteria: tuple[Criterion, ...]
    images: Annotated[int, Field(ge=1)] = 512
    """Test images on which the change of the loss is measured."""


class Protocol(Options):
    """One table."""

    heading: str
    note: str = ""
    """What a reader has to know."""
    images: Images = Images()
    networks: dict[str, Network]
    model: str = BASE
    """The network that the rows work on."""
    teacher: str | None = None
    """The network they learn from; the model as it came in if none."""
    seeds: tuple[int, ...] = (0,)
    rows: tuple[Case, ...] = ()
    goals: tuple[Goal, ...] = ()
    columns: tuple[str, ...] = ()
    """What the page shows, by the titles of `accuracy_report.COLUMNS`; those of shares and points if none."""
    ratios: bool = False
    """Measure how well ratios of the teacher's non-target probabilities are learned."""
    correlation: Correlation | None = None
    shared: Any = None
    """Nothing by itself: a place for YAML anchors."""

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        for name in filter(None, (self.model, self.teacher, *(row.model for row in self.rows))):
            if name not in self.networks:
                raise InvalidOptionError(f"there is no network {name!r}; networks: {', '.join(self.networks)}")
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise InvalidOptionError(f"two rows have one name: {', '.join(names)}")
        for index, row in enumerate(self.rows):
            if row.after is not None and row.after not in names[:index]:
                raise InvalidOptionError(f"{row.name!r} goes on from {row.after!r}, which is no row before it")
        for goal in self.goals:
            for name in (goal.row, goal.than):
                if name not in (*names, BASE):
                    raise InvalidOptionError(f"a goal names {name!r}; rows: {', '.join(names)}, {BASE}")
        if bool(self.rows) == (self.correlation is not None):
            raise InvalidOptionError("either 'rows' or 'correlation' is needed")
        return self


def load_protocol(path: Path) -> Protocol:
    """Read a protocol.

    Raises:
        OptionError: no such file, an unknown key or a value that is not allowed; the error names the file.
    """
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in PROTOCOLS.glob("*.yaml")))
        raise OptionError(f"there is no protocol {path}", hint=f"Give a .yaml file, or one of: {known}.")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise OptionError("a protocol is a mapping")
        return Protocol(**content)
    except OptionError as error:
        raise OptionError(f"{path}: {error.what}", hint=error.hint) from None
