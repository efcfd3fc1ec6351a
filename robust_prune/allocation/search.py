"""From structural curves to widths: a few allocations, and the best of them as really pruned."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from robust_prune.adversaries import adversarial_loss, adversarial_set, quick
from robust_prune.allocation.problem import Problem, Widths
from robust_prune.allocation.widths import allocate_by_curves, allocate_evenly
from robust_prune.errors import BudgetError
from robust_prune.graph import ModelGraph
from robust_prune.modules import evaluating
from robust_prune.types import Curve, PruningPlan, ThreatModel

CAPS = (0.0, 1 / 3, 2 / 3, 1.0)
STEPS = 5


def passes_of(steps: int) -> int:
    """Return what judging an image costs in forward passes, a backward one counted as two."""
    return 3 * steps + 1


def candidate_widths(
    problem: Problem, curves: Mapping[str, Curve], caps: Sequence[float] = CAPS
) -> list[Widths]:
    """Return widths at the same cost, from equal shares for all groups to what curves ask for.

    Curves of single groups do not add up, and the sum of small rises hides that a group cut to a
    few channels has nothing left to fine-tune. So the curves' freedom is limited by the share that
    a group may lose: from the share of the uniform allocation on, in steps, to `max_prune_ratio`.

    Args:
        graph: of the dense model.
        budget: that all of them reach.
        curves: by group.
        max_prune_ratio: the most that a group may lose.
        round_to: widths are multiples of it.
        caps: how far the share that a group may lose goes, from 0 (as in equal shares) to 1
            (`max_prune_ratio`); the first is that of equal shares.

    Raises:
        BudgetError: the budget is out of reach.
    """
    most, uniform = problem.max_prune_ratio, allocate_evenly(problem)
    least = max((1 - uniform[g.name] / g.width for g in problem.free), default=0.0)
    found = [uniform]
    for cap in caps[1:]:
        with contextlib.suppress(BudgetError):  # rounding may leave the uniform one just above it
            limited = replace(problem, max_prune_ratio=min(least + cap * (most - least), most))
            widths = allocate_by_curves(limited, curves)
            if widths not in found:
                found.append(widths)
    return found


def best_composed(
    graph: ModelGraph,
    plans: Sequence[PruningPlan],
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    seed: int,
    steps: int = STEPS,
    batch_size: int = 64,
    stand_in: bool = False,
    repair_: Callable[[nn.Module, PruningPlan], None] = lambda pruned, plan: None,
    on_best: Callable[[PruningPlan], None] = lambda plan: None,
) -> tuple[int, list[float]]:
    """Prune a copy by each plan and attack it; return the index of the best, and all losses.

    The loss is the mean cross-entropy, in nats, under PGD on the pruned copy: attacks made on the
    dense model say too little about a model that has changed as a whole.
    Source: candidates judged by an adapted, not yet fine-tuned model, as in Li et al., "EagleEye",
    ECCV 2020; ours: the adversarial loss.

    Args:
        graph: of the dense model; both stay as they are.
        plans: to compare, each for this model.
        images: [N, C, H, W] in [0, 1], held out of training; the attacks on them are new.
        labels: [N].
        threat: norm and eps.
        seed: of the attack's random start.
        steps: of PGD.
        batch_size: images at a time.
        stand_in: take gradients from a quicker copy; losses are the pruned model's own.
        repair_: what a pruned copy gets before it is judged (reconstruction, batch norm).
        on_best: called with every plan that is better than all before it, while it is the last
            that was repaired.
    """
    losses: list[float] = []
    best = 0
    for i, plan in enumerate(plans):
        pruned = graph.pruned(plan)
        repair_(pruned, plan)
        attacked = adversarial_set(
            quick(pruned, images) if stand_in else pruned,
            images,
            labels,
            threat=threat,
            steps=steps,
            step_size=threat.eps / 2,
            seed=seed,
            batch_size=batch_size,
        )
        with evaluating(pruned):
            losses.append(adversarial_loss(pruned, attacked))
        if i == 0 or losses[i] < losses[best] or not math.isfinite(losses[best]):
            best = i
            on_best(plan)
        del pruned  # before the next is made
    return best, losses
