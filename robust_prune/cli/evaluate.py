"""`robust-prune evaluate`."""

from __future__ import annotations

from robust_prune.cli.opening import (
    ModelPath,
    assumed_of,
    open_model,
    open_splits,
    pick_device,
    threat_model,
)
from robust_prune.cli.output import Output, duration
from robust_prune.cli.spreading import takes_options
from robust_prune.cli.tables import show_evaluation
from robust_prune.errors import UsageError
from robust_prune.options import (
    AUTO,
    DataOptions,
    JudgingOptions,
    ModelOptions,
    RunOptions,
    ThreatOptions,
)


@takes_options()
def evaluate(
    model: ModelPath,
    judging: JudgingOptions,
    threat: ThreatOptions,
    opening: ModelOptions,
    data: DataOptions,
    running: RunOptions,
    output: Output,
) -> None:
    """Measure clean, PGD-20 and AutoAttack accuracy on test images, with intervals."""
    from robust_prune import evaluation
    from robust_prune.pipeline import eval_images
    from robust_prune.types import Evaluation, to_plain

    threat_model(threat)  # what is typed is checked before anything is opened
    device = pick_device(running)
    module, record = open_model(model, opening, device, output)
    splits = open_splits(module, record, data, opening.input_size)
    if splits is None or splits.test is None:
        raise UsageError(f"{model} records no data; name it with --data")
    attacker = threat_model(threat, record)

    def measure(test: evaluation.TestImages) -> list[Evaluation]:
        if judging.evaluation == "autoattack":
            seconds = evaluation.autoattack_seconds(module, test.images, splits.classes, 0.35)
            output.line(f"AutoAttack on {len(test.labels)} images: about {duration(seconds)}")
        found = evaluation.evaluate(
            module,
            test,
            threat=attacker,
            attack=judging.evaluation,
            seed=running.seed,
            on_progress=lambda line: output.line(f"  {line}"),
        )
        return [found]

    if judging.n_eval == AUTO:
        results = evaluation.evaluate_in_rounds(
            splits.test, measure, margin=judging.margin, seed=running.seed
        )
        if wide := evaluation.too_wide(results, judging.margin):
            output.note(wide)
    else:
        n = eval_images(judging.n_eval, device)
        results = measure(evaluation.draw(splits.test, n, running.seed))
    (result,) = results
    show_evaluation(output, result, splits.name)
    left_out = splits.source.get("left_out")
    if left_out and left_out["test"]:
        output.note(next(note for note in splits.notes if "test pictures can't be read" in note))
    more = {"left_out": left_out} if left_out else {}
    output.document({**to_plain(result), **more, **assumed_of(record)})
