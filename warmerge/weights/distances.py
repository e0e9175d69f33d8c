"""How far apart the members lie: norms and angles of their task vectors, layer by layer, from Gram matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from warmerge.errors import Finding, RefusedError, plain
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.heads import is_head
from warmerge.weights.plan import TensorPlan, natural_order
from warmerge.weights.safetensors_format import AVERAGED
from warmerge.weights.stream import Engine, refuse_changed, refuse_nonfinite

Matrix = list[list[float]]


@dataclass(frozen=True)
class Distances:
    """Geometry of M members over one group of tensors.

    `relative` (M, M): |theta_i - theta_j| / |theta_i|. With a base also `norms` (M,): |delta_i|, `drift` (M,):
    |delta_i| / |base|, and `cosines` (M, M) of the task vectors delta_i = theta_i - base, NaN where one is zero.
    """

    group: str
    parameters: int
    relative: Matrix
    norms: list[float] | None = None
    drift: list[float] | None = None
    cosines: Matrix | None = None


def measure_distances(
    members: Sequence[Checkpoint], base: Checkpoint | None, threads: int, progress: Callable[[int], None] | None = None
) -> list[Distances]:
    """Reads every weight once. The first entry is the whole model, the others its parts in order, heads last.

    Raises:
        RefusedError: shapes differ, a value is NaN or Inf, no name is common to all, or a file changed meanwhile.
    """
    everything = [*members, *([] if base is None else [base])]
    names = [name for name, tensor in members[0].tensors.items() if tensor.dtype in AVERAGED and tensor.numel]
    names = [name for name in names if all(name in checkpoint.tensors for checkpoint in everything)]
    if not names:
        what = "has no tensor in common with the others; are they of one model family, with the same names?"
        raise RefusedError([Finding(everything[-1].label, what)])
    findings = []
    for name in names:
        for checkpoint in everything[1:]:
            shape, expected = checkpoint.tensors[name].shape, members[0].tensors[name].shape
            if shape != expected:
                what = f"has shape {list(shape)}, expected {list(expected)} as in {plain(members[0].label)}"
                findings.append(Finding(checkpoint.label, what, name))
    if findings:
        raise RefusedError(findings)
    plans = []
    for name in names:
        tensors = tuple(checkpoint.tensors[name] for checkpoint in everything)
        plans.append(TensorPlan(name, tensors[0].dtype, tensors[0].shape, tensors, None, merged=True))
    engine = Engine(threads, progress=progress or (lambda nbytes: None))
    grams = engine.grams(plans)
    refuse_changed(everything)
    refuse_nonfinite([plan for plan in plans if not all(map(math.isfinite, chain(*grams[plan.name])))], engine)
    groups: dict[str, list[TensorPlan]] = {"all": plans}
    for plan in sorted(plans, key=lambda plan: (is_head(plan.name), natural_order(plan.name))):
        groups.setdefault(layer_of(plan.name), []).append(plan)
    return [_distances(group, inside, grams, base is not None) for group, inside in groups.items()]


def layer_of(name: str) -> str:
    """The part of a model that a tensor belongs to.

    >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("score.weight"), layer_of("model.norm.weight")
    ('layers.3', 'head', 'model.norm')
    """
    if is_head(name):
        return "head"
    match = re.search(r"([A-Za-z_]\w*)\.(\d+)\.", name)
    return f"{match[1]}.{match[2]}" if match else name.rsplit(".", 1)[0]


def _distances(group: str, plans: Sequence[TensorPlan], grams: Mapping[str, Matrix], has_base: bool) -> Distances:
    size = len(plans[0].members)
    total = [[math.fsum(grams[plan.name][i][j] for plan in plans) for j in range(size)] for i in range(size)]
    count = size - has_base

    def apart(i: int, j: int) -> float:
        return math.sqrt(max(0.0, total[i][i] + total[j][j] - 2 * total[i][j]))

    def ratio(a: float, b: float) -> float:
        return a / b if b else math.nan

    relative = [[ratio(apart(i, j), math.sqrt(total[i][i])) for j in range(count)] for i in range(count)]
    parameters = sum(plan.numel for plan in plans)
    if not has_base:
        return Distances(group, parameters, relative)
    b = count
    norms = [apart(i, b) for i in range(count)]

    def cosine(i: int, j: int) -> float:
        inner = total[i][j] - total[i][b] - total[j][b] + total[b][b]
        value = ratio(inner, norms[i] * norms[j]) if i != j else ratio(norms[i], norms[i])
        return value if math.isnan(value) else max(-1.0, min(1.0, value))

    drift = [ratio(norm, math.sqrt(total[b][b])) for norm in norms]
    cosines = [[cosine(i, j) for j in range(count)] for i in range(count)]
    return Distances(group, parameters, relative, norms, drift, cosines)
