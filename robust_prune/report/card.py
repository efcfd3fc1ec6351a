"""A record as a model card for the Hugging Face Hub, and as an entry of RobustBench."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from robust_prune.report import rows, sentences
from robust_prune.types import ThreatModel
from robust_prune.untrusted import readable

NORM_NAMES = {"linf": "Linf", "l2": "L2"}
# RobustBench judges on all test images of these
ROBUSTBENCH_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}


def is_pruned(record: Mapping[str, Any]) -> bool:
    """Return whether a record is that of a compression."""
    return "plan" in record and "cost" in record


def to_card(record: Mapping[str, Any], repository: str | None = None) -> str:
    """Return README.md of a repository: YAML in front, then what the model is and how it was made.

    Args:
        record: of the model's file, with the spec under `model`; checked by `check_record` where it
            is that of a compression.
        repository: `owner/name` on the Hub; None leaves a place to fill in.
    """
    found = readable(record)
    pruned, spec = is_pruned(found), found["model"]
    place = f"hf-hub:{repository or 'OWNER/NAME'}"
    own = ", model=YourClass()" if spec["source"] == "custom" else ""
    size = spec.get("input_size") or (found["plan"]["input_size"] if pruned else None)
    return (
        _templates()
        .get_template("card.md")
        .render(
            front={name: _yaml(value) for name, value in _front(found, repository).items()},
            title=sentences.title(found) if pruned else str(spec["arch"]),
            size=", ".join(map(str, size or ("C", "H", "W"))),
            classes=spec.get("num_classes") or "K",
            call=Markup(f'"{place}"{own}'),
            place=Markup(place),
            pruned=pruned,
            warnings=[*found.get("notes", ()), *sentences.flags(found)],
            versions=", ".join(f"{n} {v}" for n, v in (found.get("versions") or {}).items()),
            **(_outcome(found) if pruned else {}),
        )
    )


def model_info(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of RobustBench's `model_info`; what the record does not tell is null.

    Accuracies are percentages as text, as there. They are of as many images as were measured, which
    the footnote says; the leaderboard's own are of the whole test set.
    """
    found = readable(record)
    measured = (found.get("evaluation") or {}).get("pruned")
    by_attack = {m["attack"]: m for m in (measured or {}).get("measurements", ())}
    judged = by_attack.get("autoattack")
    robust = _percent(judged)
    threat = found.get("threat")
    return {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": found.get("data_name"),
        "venue": None,
        "architecture": str(found["model"]["arch"]),
        "eps": ThreatModel(**threat).eps_text if threat else None,
        "clean_acc": _percent(by_attack.get("clean")),
        "reported": robust,
        "autoattack_acc": robust,
        "footnote": _footnote(found, measured),
        "unreliable": None if judged is None else bool(judged["flags"]),
    }


def _front(record: Mapping[str, Any], repository: str | None) -> dict[str, Any]:
    tags = ["adversarial-robustness", *(["structured-pruning"] if is_pruned(record) else [])]
    front: dict[str, Any] = {
        "library_name": "robust-prune",
        "pipeline_tag": "image-classification",
        "tags": tags,
    }
    results = _results(record)
    if results:
        name = (repository or "OWNER/NAME").rpartition("/")[2]
        front["model-index"] = [{"name": name, "results": results}]
    return front


def _results(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was measured on the pruned model, as the Hub's cards list it."""
    if not is_pruned(record) or not record.get("evaluation"):
        return []
    data = record["data_name"]
    metrics = [
        {
            "type": "accuracy",
            "value": row["pruned"]["value"],
            "name": "clean accuracy"
            if row["attack"] == "clean"
            else f"accuracy under {row['name']}, {sentences.threat_text(record)}",
        }
        for row in rows.accuracy_rows(record)
        if row["pruned"]
    ]
    task = {"type": "image-classification"}
    return [{"task": task, "dataset": {"name": data, "type": data}, "metrics": metrics}]


def _outcome(record: Mapping[str, Any]) -> dict[str, Any]:
    accuracies = rows.accuracy_table(record)
    history, plan = record.get("finetune"), record["plan"]
    asked = plan["budget"]
    return {
        "summary": sentences.summary(record),
        "evidence": sentences.evidence(record),
        "budget": (
            f"Asked for: {rows.share(asked['prune_ratio'])} of the "
            f"{rows.COST_NAMES[asked['target']]} less. Allocation {plan['allocation']}, channel "
            f"score {plan['score']}, seed {record['seed']}, plan {record['plan_digest']}."
        ),
        "cost": _markdown(("", "dense", "pruned", "change"), rows.cost_rows(record)),
        "check_line": sentences.check_line(record),
        "fit_line": sentences.fit_line(record),
        "grade_line": sentences.grade_line(record),
        "training_line": sentences.training_line(history) if history else None,
        "headline": sentences.headline(record),
        "untuned": bool(accuracies and "un-tuned" in accuracies.head),
        "accuracy": _markdown(accuracies.head, accuracies.rows) if accuracies else None,
    }


def _footnote(record: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    told = [f"{sentences.title(record)} by robust-prune."] if is_pruned(record) else []
    if measured is not None:
        most = ROBUSTBENCH_IMAGES.get(str(record.get("data_name")))
        asked = f"; RobustBench takes {most:,}" if most and measured["n"] < most else ""
        told.append(f"Measured on {measured['n']:,} {measured['split']} images{asked}.")
    return " ".join(told)


def _percent(measured: Mapping[str, Any] | None) -> str | None:
    return None if measured is None else f"{100 * measured['accuracy']['value']:.2f}"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> Markup:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    text = "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
    return Markup(text)


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(value: Any) -> str:
    """Return text in which nothing is markup: a card is Markdown, and Markdown is HTML too."""
    if isinstance(value, Markup):
        return str(value)
    line = " ".join(str(value).split())
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), ("`", "\\`"), ("](", "]\\(")):
        line = line.replace(sign, entity)
    return line


def _yaml(value: Any) -> Markup:
    """Return JSON, which is YAML, without signs that HTML begins with."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robust_prune.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_text,
    )
    environment.filters.update(sentence=sentences.sentence)
    return environment
