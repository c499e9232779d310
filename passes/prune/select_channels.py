"""`select-channels`: the network learns which of its channels it can do without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ...ir.cost import measure_cost
from ...ir.errors import BudgetError
from ...ir.graph import Graph
from ...runtime.layers.selection_mask import Alive
from ...runtime.training import TrainResult, train
from ...runtime.training.statistics import reestimate_norms
from ..base import TRAINING, Context, Pass, PassResult, Semantics
from ..budget import Budget
from ..options import InvalidOptionError
from ..train.training_options import TrainingOptions
from .selecting.guidance import Guidance, Knowledge
from .selecting.masks import ClassMasks
from .selecting.places import Init, place_masks
from .selecting.schedule import Schedule
from .selecting.selector import Rules, Selector
from .selecting.threshold import least

_Share = Annotated[float, Field(ge=0, lt=1)]
_Positive = Annotated[float, Field(gt=0)]
_Weight = Annotated[float, Field(ge=0)]


class SelectChannels(TrainingOptions, Pass):
    """Learn which channels stay: masks that train with the network, cut softly and reversibly, under its teacher's eye.

    Every channel c that could be cut gets a factor m_c behind its batch norm and before its activation; channels that
    must live and die together (a residual stage) share it. The network trains on

        L = CE + a · T² KL(teacher ‖ student) + b · Σ_stages ‖ A_S/‖A_S‖ − A_T/‖A_T‖ ‖² / positions

    with stage-end attention maps A = Σ_c F_c², which do not depend on the number of channels (or `hint`: features
    behind 1×1 adapters). Forward a channel that is cut is zero, backward it is there: `∂L/∂m_c = Σ ∂L/∂y_c · BN(x)_c`
    and `∂L/∂BN(x)_c = m_c ∂L/∂y_c` in any case, so that it may return. Each step shrinks the factors of what is on,
    `m ← sign(m) max(|m| − η λ w, 0)`, with w the MACs that one channel saves through its whole dependency group, over
    the mean, and λ falling to 0 as the budget is reached.

    What these gradients reach is a choice, `alive`, as a ReLU has no slope at an output of exactly zero. By default
    (`factors`) they go through it to the factor of a channel that is off, so that it feels what the loss would gain by
    its return, while the layers before learn from what is on. `layers` is the formula to the letter: what is off trains
    without an effect that could tell it to stop, which ruins short runs. With `sums` they exist only where channels
    meet in a sum before the ReLU; a channel alone behind its own does not come back.

    A channel is on while its importance is at least τ; one that was cut returns at 1.1 τ. Importance is

        `saliency`    √( E[(m_c ∂L/∂m_c)²] / w_c ), a mean over steps that fades by 1 % each: the squared first-order
                      change of the loss if the channel went, per MAC saved; it does not change when a factor moves from
                      m into γ. Of a channel that is off, max(0, −E[m_c ∂L/∂m_c]) / √w_c: what the loss would gain
        `magnitude`   |m_c|

    and τ is what meets the limits by bisection. They fall from the present cost to the budget along a cubic, from the
    end of the free phase to the end of the ramp. In the end the switches are final: `prune-channels: {masks: learned}`
    removes what is off and folds the rest into the norms, γ ← m γ and β ← m β, without changing the outputs.

    Sources: patent CN109993302A (2019), of which we know the abstract: masks on all channels, soft cut while learning,
    hard cut at the end, knowledge of the uncut network as guidance. The formulas are our choice: straight-through
    estimator, Bengio et al. 2013; attention transfer, Zagoruyko and Komodakis 2017; squared first-order importance at
    gates behind batch norm, Molchanov et al. 2019; importance per cost, Theis et al. 2018.
    """

    name: ClassVar[str] = "select-channels"
    semantics: ClassVar[Semantics] = TRAINING
    needs: ClassVar[tuple[str, ...]] = ("train",)

    budget: Budget
    """What may remain: `macs` and/or `params`, as a fraction or an amount; met within 2 %."""
    knowledge: Knowledge = "attention"
    """What guides: the teacher's class scores with `attention` maps or `hint` features, `logits` alone, or `none`."""
    places: tuple[str, ...] | None = None
    """Where knowledge is compared: names or glob patterns; by default the last activation of each resolution."""
    teacher_places: tuple[str, ...] | None = None
    """The same in the teacher, if they are called otherwise there."""
    distill: _Weight = 0.9
    """a: weight of the teacher's class scores."""
    temperature: _Positive = 4.0
    """T: the higher, the more the teacher's small probabilities count."""
    label_smoothing: _Share = 0.0
    """Share of a target's probability that is spread over all classes."""
    knowledge_weight: _Weight | None = None
    """b: weight of `attention` (1000 if not given) or `hint` (1)."""
    init: Init = "ones"
    """First factors: `ones` leave the network as it is; `normal` |N(1, 0.1)|, `uniform` U(0.5, 1.5), `unit` U(0, 1)."""
    score: Literal["saliency", "magnitude"] = "saliency"
    """Importance of a channel: `saliency` |m · slope| per MAC saved, or `magnitude` |m|."""
    threshold: Literal["budget", "median"] = "budget"
    """τ meets the falling limits (`budget`), or rises to a tenth of the median importance (`median`): then λ cuts."""
    cut: Literal["soft", "hard"] = "soft"
    """`hard` cuts to the budget at the end of the free phase, for good: what the reversible cut is compared with."""
    alive: Literal["sums", "factors", "layers"] = "factors"
    """What of a channel that is off goes on learning: its part in `sums`, its `factors`, or its `layers` too."""
    sparsity: _Weight = 0.5
    """How far the factor of a channel of mean saving shrinks over the ramp if the loss does not care."""
    mask_lr: _Positive = 1.0
    """Learning rate of the factors, times that of the weights."""
    free: _Share = 0.1
    """Share of the run in which nothing is cut yet."""
    ramp: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the run at which the budget is reached."""
    settle: _Share = 0.2
    """Share at the end in which nothing is exchanged any more."""
    interval: _Positive | None = None
    """Epochs between evaluations of τ; by default one, or a fortieth of the run if that is less."""
    stable: Annotated[int, Field(ge=1)] | None = 5
    """End after so many epochs in which no channel changed its state, once the budget is met."""
    round_to: Annotated[int, Field(ge=1, le=1024)] = 1
    """Widths become multiples of this many channels."""
    floor: Annotated[int, Field(ge=1)] = 1
    """No group keeps fewer channels than this."""
    ignore: tuple[str, ...] = ()
    """Layers, by name or glob pattern, whose output channels all stay."""
    recalibrate: Annotated[int, Field(ge=0)] = 100
    """Batches from which the statistics of batch norms are estimated anew in the end; 0 leaves them."""
    clip_norm: _Positive | None = None
    """Gradients of a larger norm are scaled down to it."""
    keep: Literal["last"] = "last"
    """The last epoch: earlier ones have not been selected to the end."""

    @model_validator(mode="after")
    def _check(self) -> SelectChannels:
        unmet = [m for m in self.budget.metrics if m not in ("macs", "params")]
        if unmet:
            raise InvalidOptionError(f"option 'budget': given {unmet[0]!r}, allowed: 'macs', 'params'")
        if not self.free < self.ramp <= 1 - self.settle:
            raise InvalidOptionError(
                f"the phases overlap: 'free' {self.free:g} must be below 'ramp' {self.ramp:g}, and that at most 1 - "
                f"'settle' = {1 - self.settle:g}"
            )
        return self

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Insert masks, train with the selector, settle."""
        alive: Alive = self.alive if self.cut == "soft" else "none"
        masks = place_masks(graph, ignore=self.ignore, init=self.init, alive=alive, seed=context.seed)
        limits = self._limits(masks, context)
        teacher = context.teacher if context.teacher is not None else context.original.module
        guidance = self._guidance()
        taps = guidance.taps(graph, teacher)
        selector = Selector(masks, self._rules(limits), self._schedule())
        log = self.log or (context.workdir and context.workdir / "log")
        result = train(
            graph.module,
            context.data,
            objective=guidance.objective(graph, teacher, taps, context.seed),
            teacher=teacher,
            settings=self.train_settings(),
            seed=context.seed,
            console=context.console,
            title=self.name,
            callbacks=[selector],
            taps=taps,
            checkpoints=context.workdir,
            log=Path(log) if log else None,
        )
        selector.finish()
        batches = reestimate_norms(graph.module, context.data, self.recalibrate, seed=context.seed)
        with graph.edit(self.name):
            pass  # the values have changed: the epoch moves on, the history tells
        notes = [_describe(selector), f"{batches} batches for the statistics of batch norms"]
        return PassResult(notes[: 1 + bool(batches)], metrics=_metrics(result, selector))

    def _limits(self, masks: ClassMasks, context: Context) -> dict[str, float]:
        """What may remain, by metric.

        Raises:
            BudgetError: less than the smallest network that can be selected.
        """
        original, smallest = measure_cost(context.original), least(masks, round_to=self.round_to, floor=self.floor)
        limits = {m: self.budget.limit(m, getattr(original, m)) for m in self.budget.metrics}
        for metric, limit in limits.items():
            reachable = getattr(smallest, metric)
            if reachable > limit:
                raise BudgetError(
                    f"{self.title()} cannot meet its budget ({metric}: {limit:.4g} allowed, {reachable:.4g} is the "
                    "least that can be reached)",
                    hint="Raise the budget, or lower floor, round_to or ignore.",
                )
        return limits

    def _rules(self, limits: dict[str, float]) -> Rules:
        return Rules(limits, self.score, self.threshold, self.cut == "hard", self.sparsity, self.mask_lr, self.round_to,
                     self.floor, self.stable)  # fmt: skip

    def _schedule(self) -> Schedule:
        interval = self.interval if self.interval is not None else min(1.0, self.epochs / 40)
        return Schedule(self.epochs, self.free, self.ramp, self.settle, interval)

    def _guidance(self) -> Guidance:
        return Guidance(
            self.knowledge,
            self.places,
            self.teacher_places,
            self.distill,
            self.temperature,
            self.knowledge_weight,
            self.label_smoothing,
        )


def _describe(selector: Selector) -> str:
    masks, last = selector.masks, selector.history[-1]
    returned = sum(int(row["returned"]) for row in selector.history)
    return (
        f"{int(last['channels'])} of {int(masks.selectable.sum())} channels selected, MACs {last['macs']:.3f}, "
        f"parameters {last['params']:.3f} of before; {returned} came back after a cut"
    )


def _metrics(result: TrainResult, selector: Selector) -> dict[str, Any]:
    return {
        "selection": selector.history,
        "loss": [epoch.loss for epoch in result.epochs],
        "accuracy": [epoch.accuracy for epoch in result.epochs],
        "steps": result.steps,
        "images_per_second": result.images_per_second,
    }
