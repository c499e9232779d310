"""Torch-Pruning on one network, as its README does it, and whether what came out is right.

Attempts, in order, until one gives a network that is right: the README's call (which rounds widths to multiples of 8),
the same without rounding, and for networks with attention the recipe of its authors' examples (heads named, `num_heads`
and `head_dim` repaired after the cut).

Right means: the pruned network runs, its output has the shape that it had, its MACs fell, and it computes what the
original computes when each layer reads zero in the channels that were taken from its input. That last check follows
every index list that Torch-Pruning applies, layer by layer, and masks the inputs of the original with hooks; LayerNorm
and GroupNorm take their statistics over the kept channels. Networks that hold other functions of channel statistics
(`STATISTICS`), or a cut `nn.MultiheadAttention`, cannot be judged so: nothing is called wrong there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .zoo import Subject, distance, tensors

WRONG = 1e-4  # relative, in fp32; looked at again in double precision before it is called wrong
WRONG_DOUBLE = 1e-6
STATISTICS = ("RMSNorm", "SimpleNorm", "ResponseNorm", "StdConv", "EvoNorm", "L2Norm")


@dataclass
class Attempt:
    """Options of one attempt."""

    name: str
    round_to: int | None
    heads: bool


ATTEMPTS = (Attempt("README", 8, False), Attempt("README, no rounding", None, False), Attempt("ViT recipe", None, True))


@dataclass
class Positions:
    """Which of its original channels a layer still reads and still gives out."""

    reads: Tensor
    gives: Tensor


@dataclass
class Record:
    """Every layer that was cut, by its name, with the channels that it kept; and what could not be followed."""

    layers: dict[str, Positions] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)


def measure(subject: Subject, deadline: Callable[[], Any]) -> dict[str, Any]:
    """Prune `subject` with Torch-Pruning; the facts by the names of the columns of `coverage.py`.

    Args:
        subject: the network; not changed.
        deadline: context manager that raises TimeoutError when graph building and pruning take too long.
    """
    facts: dict[str, Any] = {"cut": False}
    errors = []
    for attempt in ATTEMPTS:
        if attempt.heads and not any(_attentions(subject.model)) and not _torchvision_vit(subject.model):
            continue
        try:
            facts |= _attempt(subject, attempt, deadline)
        except TimeoutError as error:
            errors.append(f"{attempt.name}: {error}")
            break
        except Exception as error:  # whatever the peer raises is its result
            text = (str(error).strip().splitlines() or [""])[0]
            errors.append(f"{attempt.name}: {type(error).__name__}: {text[:160]}")
            continue
        if facts["cut"]:
            return facts | {"reason": None}
        errors.append(f"{attempt.name}: {facts['reason']}")
    return facts | {"cut": False, "reason": " | ".join(errors)}


def _attempt(subject: Subject, attempt: Attempt, deadline: Callable[[], Any]) -> dict[str, Any]:
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        before = model(subject.image)
    record = Record()
    with deadline():
        start = time.process_time()
        pruner = make_pruner(model, subject.image, before, attempt)
        built = time.process_time()
        following = 0.0
        for group in pruner.step(interactive=True):
            mark = time.process_time()
            _follow(group, pruner.DG, record)
            following += time.process_time() - mark
            group.prune()
        pruned = time.process_time() - following
    if attempt.heads:
        _repair_heads(model, pruner)
    facts: dict[str, Any] = {"recipe": attempt.name, "graph_seconds": built - start, "cut_seconds": pruned - built}
    with torch.no_grad():
        after = model(subject.image)
    if [t.shape for t in tensors(before)] != [t.shape for t in tensors(after)]:
        return facts | {"cut": False, "reason": "the output has another shape"}
    facts["macs_left"] = count_macs(model, subject.image) / count_macs(subject.model, subject.image)
    facts |= _check(subject, model, record)
    facts["cut"] = not facts["wrong"] and facts["macs_left"] < 0.99
    gap = f"silently wrong: differs from the masked network by {facts['distance']:.1e}"
    facts["reason"] = gap if facts["wrong"] else "MACs did not fall"
    return facts


def make_pruner(model: nn.Module, image: Tensor, output: Any, attempt: Attempt) -> Any:
    """The README's pruner: uniform 50 % of channels by group L2 magnitude, the classifier left alone."""
    classes = tensors(output)[0].shape[1]
    ignored = [
        layer
        for layer in model.modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == classes)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == classes)
    ]
    heads, round_to = {}, attempt.round_to
    if attempt.heads:
        heads = {module.qkv: module.num_heads for module in _attentions(model)}
        _free_widths(model)
        ignored += [m for m in model.modules() if isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)]
        round_to = max((m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)), default=None)
    return tp.pruner.BasePruner(
        model,
        image,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=ignored,
        round_to=round_to,
        num_heads=heads,
        in_channel_groups={},
        out_channel_groups={},
        output_transform=None if isinstance(output, Tensor) else tensors,
    )


def _attentions(model: nn.Module) -> Iterator[Any]:
    """Modules built like timm's Attention: one `qkv` layer and a number of heads."""
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads"):
            yield module


def _free_widths(model: nn.Module) -> None:
    """Replace timm's attention forward, which needs input width = heads × head width, as the authors' example does."""
    for module in _attentions(model):
        if type(module).__name__ == "Attention" and hasattr(module, "q_norm"):
            module.forward = _attention_forward.__get__(module)


def _attention_forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """timm's Attention.forward with the output width left open; x (N, L, C) → (N, L, C)."""
    batch, length, _width = x.shape
    qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    weights = (self.q_norm(q) * self.scale) @ self.k_norm(k).transpose(-2, -1)
    x = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, -1)
    result: Tensor = self.proj(x)
    return result


def _torchvision_vit(model: Any) -> bool:
    return hasattr(model, "conv_proj") and hasattr(model, "hidden_dim")


def _repair_heads(model: Any, pruner: Any) -> None:
    if _torchvision_vit(model):
        model.hidden_dim = model.conv_proj.out_channels
    for module in _attentions(model):
        module.num_heads = pruner.num_heads[module.qkv]
        module.head_dim = module.qkv.out_features // (3 * module.num_heads)


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of one forward pass (convolutions, matrix products, attention)."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)  # the counter's module hooks stumble over leaves inside of tuples
    # fused attention kernels are not known to the counter, the plain operations are
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(image)
    torch.backends.mha.set_fastpath_enabled(fast)
    for parameter in learned:
        parameter.requires_grad_(True)
    return int(counter.get_total_flops() // 2)


def _follow(group: Any, graph: Any, record: Record) -> None:
    """Note what the items of a group take from each layer, before they do."""
    for dep, indices in group:
        layer = dep.target.module
        if isinstance(layer, nn.Parameter):
            record.opaque.add(graph._param_to_name[layer])
            continue
        name = graph._module2name.get(layer)
        if not isinstance(layer, FOLLOWED):
            if name and next(layer.parameters(), None) is not None:
                record.opaque.add(name)
            continue
        plain = [int(getattr(index, "idx", index)) for index in indices]
        at = record.layers.get(name) or Positions(torch.arange(_reads(layer)), torch.arange(_gives(layer)))
        outward = graph.is_out_channel_pruning_fn(dep.handler)
        inward = graph.is_in_channel_pruning_fn(dep.handler)
        record.layers[name] = Positions(
            _without(at.reads, plain) if inward else at.reads, _without(at.gives, plain) if outward else at.gives
        )


FOLLOWED = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.PReLU,
)


def _without(kept: Tensor, removed: list[int]) -> Tensor:
    stays = torch.ones(len(kept), dtype=torch.bool)
    stays[removed] = False
    return kept[stays]


def _reads(layer: Any) -> int:
    return int(_first(layer, "in_channels", "in_features", "num_features", "num_channels", "num_parameters"))


def _gives(layer: Any) -> int:
    return int(_first(layer, "out_channels", "out_features", "num_features", "num_channels", "num_parameters"))


def _first(layer: Any, *names: str) -> int:
    if isinstance(layer, nn.LayerNorm):
        return int(layer.normalized_shape[-1])
    return int(next(getattr(layer, name) for name in names if hasattr(layer, name)))


def _check(subject: Subject, pruned: nn.Module, record: Record) -> dict[str, Any]:
    """Distance between the pruned network and the original with the same channels masked where layers read them."""
    masked = copy.deepcopy(subject.model)
    layers = dict(pruned.named_modules())
    for name, layer in masked.named_modules():
        at = record.layers.get(name)
        if at is None:
            continue
        if isinstance(layer, (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)):
            layer.register_forward_hook(_norm_of_kept(layers[name], at.reads))
        else:
            layer.register_forward_pre_hook(_mask_reads(layer, at.reads))
            layer.register_forward_hook(_mask_gives(layer, at.gives))
    gap = _gap(masked, pruned, subject.image)
    if gap > WRONG:
        gap = _gap(masked.double(), pruned.double(), subject.image.double())
    bound = WRONG_DOUBLE if next(pruned.parameters()).dtype == torch.float64 else WRONG
    judged = not any(word in type(layer).__name__ for layer in pruned.modules() for word in STATISTICS)
    judged &= not any(isinstance(layers.get(name), nn.MultiheadAttention) for name in record.opaque)
    return {"distance": gap, "wrong": gap > bound and judged, "judged": judged, "unfollowed": len(record.opaque)}


def _gap(reference: nn.Module, candidate: nn.Module, image: Tensor) -> float:
    with torch.no_grad():
        return distance(reference(image), candidate(image))


def _mask_reads(layer: nn.Module, kept: Tensor) -> Callable[..., Any]:
    """Forward pre-hook that zeroes the channels of the input that the pruned layer no longer has."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_masked(inputs[0], layer, kept), *inputs[1:])

    return hook


def _mask_gives(layer: nn.Module, kept: Tensor) -> Callable[..., Any]:
    """Forward hook that zeroes the removed outputs, for readers without weights (products in attention)."""

    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _masked(output, layer, kept)

    return hook


def _masked(x: Tensor, layer: nn.Module, kept: Tensor) -> Tensor:
    axis = x.ndim - 1 if isinstance(layer, nn.Linear) else 1
    mask = torch.zeros(x.shape[axis], dtype=x.dtype)
    mask[kept] = 1
    return x * mask.view([-1 if i == axis else 1 for i in range(x.ndim)])


def _norm_of_kept(pruned: nn.Module, kept: Tensor) -> Callable[..., Any]:
    """Forward hook: a norm takes its statistics over the kept channels alone, zeros elsewhere."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        last = isinstance(layer, nn.LayerNorm) and not type(layer).__name__.endswith("2d")
        axis = x.ndim - 1 if last else 1
        scattered = torch.zeros_like(output)
        scattered.index_copy_(axis, kept, copy.deepcopy(pruned).to(x.dtype)(x.index_select(axis, kept)))
        return scattered

    return hook
