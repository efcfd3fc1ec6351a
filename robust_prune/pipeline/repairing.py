"""After the cut: the proof that it was right, and the repair of what is left."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from robust_prune.data import synthetic_images
from robust_prune.graph import check_pruned
from robust_prune.pipeline.job import Job
from robust_prune.pipeline.measuring import Observed
from robust_prune.pipeline.record import Fitted, Recalibrated, SelfCheck
from robust_prune.pipeline.settings import Settings
from robust_prune.repair import Rows, fill_constants_, recalibrate_batchnorm_
from robust_prune.types import PruningPlan

BATCHNORM_IMAGES = 2048
SELF_CHECK_IMAGES = 2


def prove(job: Job, whole: nn.Module, pruned: nn.Module, plan: PruningPlan) -> None:
    """Compare the pruned model with the masked whole one, before anything else is changed.

    Raises:
        PlanError: they differ by more than rounding.
    """
    journal = job.journal
    if not job.settings.verify:
        journal.note("the pruned model was not compared with the masked dense one")
        journal.tell(self_check=SelfCheck(done=False))
        return
    with journal.timed("self-check"):
        images = synthetic_images(SELF_CHECK_IMAGES, job.input_size, job.settings.seed)
        error, dtype = check_pruned(whole, pruned, plan, images)
    name = str(dtype).removeprefix("torch.")
    journal.tell(self_check=SelfCheck(done=True, images=len(images), dtype=name, error=error))


def repair_(
    job: Job,
    model: nn.Module,
    observed: Observed,
    plan: PruningPlan,
    rows: Mapping[str, Rows],
    settings: Settings,
) -> None:
    """Fit the weights that are left to what the whole layers gave, and renew batch norms.

    Args:
        job: the run.
        model: pruned; changed in place.
        observed: of the model before the cut.
        plan: that was applied.
        rows: `kept_rows` of the plan, made before the cut.
        settings: of this pruning step.
    """
    journal = job.journal
    fill_constants_(model, observed.branches, rows)
    if observed.reconstruction is not None:
        with journal.timed("reconstruction"):
            known = observed.repaired.pop(plan.digest, None)
            if known is None:
                fits = observed.reconstruction.apply_(model, rows)
            else:
                known.put_into_(model)
                fits = known.fits
        journal.tell(reconstruction=Fitted(len(observed.reconstruction.images), fits))
    if job.splits is None:
        return
    with journal.timed("batch norm"):
        batches = job.splits.train.batches(
            settings.batch_size, seed=settings.seed, limit=BATCHNORM_IMAGES, verdicts=False
        )
        layers = recalibrate_batchnorm_(model, batches)
    images = min(BATCHNORM_IMAGES, len(job.splits.train))
    journal.tell(batchnorm=Recalibrated(layers, images if layers else 0))
