"""The networks that the benchmarks run on: names by pattern, random weights in which nothing is multiplied by zero.

A fresh network hides mistakes: BatchNorm statistics are 0 and 1 everywhere, the last scale of a residual block may be
0, layer scale 1e-6. So every constant parameter gets random values, and BatchNorm statistics are those of the layer's
real input, shaken, so that activations neither vanish nor explode in a network of any depth.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..models import load_model

CLASSIFICATION, SEGMENTATION = "torchvision:classification", "torchvision:segmentation"
TIMM_SAMPLE = "timm:sample"
DEFAULT_PATTERNS = (CLASSIFICATION, SEGMENTATION, TIMM_SAMPLE)


@dataclass
class Subject:
    """A network under test, in eval mode, with one example image."""

    name: str
    model: nn.Module
    image: Tensor  # (1, 3, H, W)
    kind: str  # "cnn", "attention" or "mlp"


def names(patterns: tuple[str, ...]) -> list[str]:
    """Model names such as `timm:resnet18` for the given patterns, in order and without repetition.

    A pattern is `torchvision:GLOB`, `timm:GLOB`, or one of the lists `torchvision:classification`,
    `torchvision:segmentation` and `timm:sample`.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        source, _, glob = pattern.partition(":")
        if pattern == TIMM_SAMPLE:
            listed = timm_sample()
        elif source == "torchvision":
            listed = _torchvision_names(glob)
        elif source == "timm":
            listed = fnmatch.filter(_timm_names(), glob)
        else:
            raise SystemExit(f"pattern {pattern!r}: give torchvision:GLOB or timm:GLOB")
        found.update((f"{source}:{name}", None) for name in listed)
    return list(found)


def _torchvision_names(glob: str) -> list[str]:
    import torchvision

    classification: list[str] = torchvision.models.list_models(module=torchvision.models)
    segmentation: list[str] = torchvision.models.list_models(module=torchvision.models.segmentation)
    if glob == "classification":
        return classification
    if glob == "segmentation":
        return segmentation
    return fnmatch.filter(classification + segmentation, glob)


def _timm_names() -> list[str]:
    import timm

    return [name for name in timm.list_models() if not name.startswith("test_")]


def timm_sample() -> list[str]:
    """The smallest network, by parameters, of every architecture family of timm.

    A family is an architecture file together with the letters with which the name begins: `resnet.py` alone holds
    ResNets, ResNeXts, SE-, ECA- and anti-aliased ones. Toy networks (`test_*`) are left out. The list costs two minutes
    to compute (each of some 1,300 networks is built without memory) and is cached per timm version.
    """
    import timm

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxpress" / f"timm-{timm.__version__}.json"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(_smallest_of_each_family()))
    sample: list[str] = json.loads(cache.read_text())
    return sample


def _smallest_of_each_family() -> list[str]:
    import timm
    from timm.models import _registry

    families: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for name in _timm_names():
        stem = re.match(r"[a-z]+", name)
        assert stem is not None, name
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        families[_registry._model_to_module[name], stem.group()].append((size, name))
    return [min(members)[1] for _, members in sorted(families.items())]


def build(name: str, *, size: int | None = None, seed: int = 0) -> Subject:
    """The network `source:name` with random weights, in eval mode, with one random image of its own resolution."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = load_model(name, seed=seed)
    assert isinstance(model, nn.Module), name
    channels, height, width = inputs[0].shape[1:]
    if name.startswith("torchvision:"):
        height = width = getattr(model, "image_size", None) or _published_resolution(name.removeprefix("torchvision:"))
    if size is not None:
        height = width = size
    torch.manual_seed(seed)
    return prepare(name, model, torch.randn(1, channels, height, width))


def prepare(name: str, model: nn.Module, image: Tensor) -> Subject:
    """Randomise what a fresh network leaves constant, and find out of what kind it is."""
    model.eval()
    randomise_constants(model)
    attention = calibrate_batchnorm(model, image)
    for parameter in model.parameters():
        parameter.grad = None
    return Subject(name, model, image, "attention" if attention else _kind_without_attention(model))


def _published_resolution(name: str) -> int:
    """Smallest side of the images that the published weights of a torchvision model were trained on."""
    import torchvision

    sides = []
    for weights in torchvision.models.get_model_weights(name):
        preset = weights.transforms()
        side = getattr(preset, "crop_size", None) or preset.resize_size
        sides.append(int(side[0]))
    return min(sides)


@torch.no_grad()
def randomise_constants(model: nn.Module) -> None:
    """Give random values to every parameter whose elements are all alike: affine norms, layer scale, zeroed layers.

    A single non-zero number (a temperature) stays, it multiplies no zero into anything.
    """
    for name, parameter in model.named_parameters():
        first = parameter.flatten()[:1]
        if not bool((parameter == first).all()) or (parameter.numel() == 1 and bool(first != 0)):
            continue
        if bool(first == 0) and name.endswith("bias"):
            parameter.normal_(0, 0.1)
        elif bool(first == 0) and sum(side > 1 for side in parameter.shape) > 1:
            parameter.normal_(0, (parameter.numel() / parameter.shape[0]) ** -0.5)
        else:
            parameter.uniform_(0.5, 1.5)


@torch.no_grad()
def calibrate_batchnorm(model: nn.Module, image: Tensor) -> bool:
    """Set BatchNorm statistics to those of one forward pass, shaken; return whether two activations were multiplied."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [layer.register_forward_pre_hook(_calibrate) for layer in layers if layer.track_running_stats]
    watch = _AttentionWatch()
    with watch:
        model(image)
    for hook in hooks:
        hook.remove()
    return watch.found


def _calibrate(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Forward pre-hook: mean off by a third of a deviation, variance by a factor of 0.5 to 1.5."""
    x = inputs[0]
    dims = [0, *range(2, x.ndim)]
    mean, second = x.mean(dims), x.pow(2).mean(dims)
    spread = second - mean.pow(2)
    # over a single value (after global pooling) the variance is 0: take its magnitude instead
    spread = torch.where(spread > 1e-4 * second, spread, second) + 1e-6
    running_mean, running_var = layer.running_mean, layer.running_var
    assert isinstance(running_mean, Tensor)
    assert isinstance(running_var, Tensor)
    running_mean.copy_(mean + spread.sqrt() * torch.randn_like(mean) / 3)
    running_var.copy_(spread * torch.empty_like(mean).uniform_(0.5, 1.5))


class _AttentionWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether a matrix product of two activations (attention in any of its forms) runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.found |= "attention" in name or name.startswith(("aten.bmm", "aten.baddbmm"))
        return func(*args, **(kwargs or {}))


def _kind_without_attention(model: nn.Module) -> str:
    """`cnn` if at least two convolutions overlap (kernel larger than stride), else `mlp` (mixers cut patches only)."""
    overlapping = 0
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            overlapping += any(k > s for k, s in zip(module.kernel_size, module.stride, strict=True))
    return "cnn" if overlapping >= 2 else "mlp"


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a network's output, whatever it is nested in."""
    return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def distance(reference: Any, candidate: Any) -> float:
    """Largest difference over the tensors of two outputs, relative to the largest magnitude of the reference."""
    worst = 0.0
    for a, b in zip(tensors(reference), tensors(candidate), strict=True):
        if a.shape != b.shape:
            return float("inf")
        gap = (a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)
        worst = max(worst, float(gap)) if bool(torch.isfinite(gap)) else float("inf")
    return worst
