"""What a record says, in sentences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from robust_prune.report.rows import (
    ATTACK_NAMES,
    COST_NAMES,
    accuracy_rows,
    percent,
    removed,
    share,
)
from robust_prune.types import ThreatModel
from robust_prune.untrusted import shortened

SIGNIFICANT = 0.05  # p-values below it are told as a difference


def title(record: Mapping[str, Any]) -> str:
    """Return `resnet18, 50.1 % of the multiply-adds removed`, of what the budget was about."""
    target = record["plan"]["budget"]["target"]
    name = shortened(record["model"]["arch"], 80)
    return f"{name}, {share(removed(record, target))} of the {COST_NAMES[target]} removed"


def sentence(text: str) -> str:
    """Return the text with a capital letter in front and a full stop behind."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def summary(record: Mapping[str, Any]) -> str:
    """Return in one sentence what came out, for a reader who knows no attack by name."""
    costs = (
        f"The pruned model needs {share(removed(record, 'macs'))} less computation and has "
        f"{share(removed(record, 'params'))} fewer parameters"
    )
    row = strongest(record)
    if row is None:
        return f"{costs}; how accurate it is was not measured."
    where = "without an attack" if row["attack"] == "clean" else "under attack"
    if row["pruned"] is None:
        return f"{costs}; how accurate it is {where} was not measured."
    told = f"{costs}; {where} it is right on {share(row['pruned']['value'])} of the test images"
    return f"{told}{_against(row)}."


def _against(row: Mapping[str, Any]) -> str:
    """What is said of the dense model, and of chance."""
    if row["dense"] is None:
        return ""
    before, after, p = row["dense"]["value"], row["pruned"]["value"], row["p_value"]
    told = f", the dense model on {share(before)}"
    if p is None:
        return told
    if p >= SIGNIFICANT:
        return f"{told}: no difference beyond chance on {row['pruned']['n']:,} images"
    return f"{told}: a {'gain' if after > before else 'loss'} beyond chance"


def strongest(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the row of the strongest attack that was measured, None where nothing was."""
    rows = accuracy_rows(record)
    return next((row for row in reversed(rows) if row["pruned"]), rows[-1] if rows else None)


def evidence(record: Mapping[str, Any]) -> str:
    """Return what the summary rests on: attack, threat, n, seed, intervals, test."""
    row = strongest(record)
    if row is None:
        return (
            f"No accuracy was measured; sensitivity comes from {record['sensitivity']['n']:,} "
            f"{record['data_name']}, {threat_text(record)}, seed {record['seed']}."
        )
    found = record["evaluation"]
    measured = found["dense"] or found["pruned"]
    told = [
        f"{name} {percent(row[key])}"
        for key, name in (("dense", "dense"), ("pruned", "pruned"))
        if row[key]
    ]
    attack = "no attack" if row["attack"] == "clean" else row["name"]
    test = "" if row["p_value"] is None else f"; paired McNemar test p = {row['p_value']:.3g}"
    return (
        f"n = {measured['n']:,} {measured['split']} images of {record['data_name']}; {attack}, "
        f"{threat_text(record)}, seed {measured['seed']}: {', '.join(told)} "
        f"(95 % Wilson intervals){test}."
    )


def headline(record: Mapping[str, Any]) -> str:
    """Return how the accuracies were measured: n, split, threat, seed, interval."""
    dense = (record.get("evaluation") or {}).get("dense")
    if not dense:
        return "accuracy was not measured"
    return (
        f"{dense['n']} {dense['split']} images of {record['data_name']}, {threat_text(record)}, "
        f"seed {dense['seed']}; 95 % Wilson intervals; p: paired McNemar test"
    )


def threat_text(record: Mapping[str, Any]) -> str:
    """Return `linf 8/255`."""
    return str(ThreatModel(**record["threat"]))


def flags(record: Mapping[str, Any]) -> list[str]:
    """Return the warnings of measurements, with the model and the attack they are about."""
    lines = []
    for which in ("dense", "pruned"):
        for measured in ((record.get("evaluation") or {}).get(which) or {}).get("measurements", ()):
            name = ATTACK_NAMES.get(measured["attack"], measured["attack"])
            lines += [f"{which}, {name}: {line}" for line in measured["flags"]]
    return lines


def grade_line(record: Mapping[str, Any]) -> str:
    """Return what the plan was decided on and what that is worth; empty for older records."""
    found = record.get("calibration")
    if not found:
        return ""
    advice = f"; {found['advice']}" if found["advice"] else ""
    return f"{found['grade']} (labels: {found['labels']}){advice}"


def check_line(record: Mapping[str, Any]) -> str:
    """Return what could be pruned, and how the result compares with masking."""
    line = f"{100 * record.get('reachable', 1):.0f} % of the parameters lie along channels that "
    line += "can be removed"
    check = record.get("self_check") or {}
    if check.get("done"):
        line += (
            f"; the pruned model's logits equal the masked dense one's to {check['error']:.0e} "
            f"({check['images']} images, {check['dtype']})"
        )
    return line


def fit_line(record: Mapping[str, Any]) -> str:
    """Return what reconstruction did to the layers that are left."""
    fitted = record.get("reconstruction")
    if not fitted or not fitted["layers"]:
        return "no weights were reconstructed"
    before, after = (
        statistics.median(layer[key] for layer in fitted["layers"]) for key in ("before", "after")
    )
    return (
        f"weights of {len(fitted['layers'])} layers were fitted to the dense model's activations "
        f"on {fitted['images']} images, adversarial and clean: median relative squared error "
        f"{before:.3f} -> {after:.3f}"
    )


def search_line(search: Mapping[str, Any]) -> str:
    """Return how the allocation was chosen."""
    return (
        f"candidates from equal shares to free curves, pruned and attacked by {search['attack']} "
        f"on {search['images']} images; number {search['chosen'] + 1} was taken"
    )


def drop_line(record: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return how the ratio was found, and on what."""
    return (
        f"the largest ratio tried at which {found['models']} models lose at most "
        f"{found['max_drop']:g} percentage points of robust accuracy ({found['attack']}, seed "
        f"{found['seed']}) against the dense model on the same {found['split']} images of "
        f"{record['data_name']}; 95 % intervals of the paired difference"
    )


def mrs_line(s: Mapping[str, Any]) -> str:
    """Return how MRS was measured."""
    structural = s["method"] == "structural"
    return (
        f"{s['method']}, {'half of each group' if structural else 'rho ' + format(s['rho'], 'g')}, "
        f"{s['n']} images, {s['attack']}, seed {s['seed']}; adversarial loss "
        f"{s['adversarial_loss']:.4f} nats; {s['seconds']:.1f} s."
        f"{'' if structural else ' A group of layers takes the largest value of its members.'}"
    )


def training_line(history: Mapping[str, Any]) -> str:
    """Return by which method and how was fine-tuned, and on what the kept epoch was chosen."""
    stopped = "; stopped before its end" if history["interrupted"] else ""
    how = f"; {history['how']}" if history.get("how") else ""
    return f"{history['method']}{how}; selected by {history['validation']}{stopped}"


def whole_lines(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, why) of every layer that stays whole and of every group with a note."""
    fixed = [(item["name"], f"stays whole: {item['reason']}") for item in plan["unprunable"]]
    return fixed + [(g["name"], g["note"]) for g in plan["groups"] if g["note"]]
