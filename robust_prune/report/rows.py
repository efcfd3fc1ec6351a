"""What a record says, as rows of tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ATTACK_NAMES = {"clean": "clean", "pgd": "PGD-20", "autoattack": "AutoAttack"}
COST_NAMES = {"macs": "multiply-adds", "params": "parameters", "channels": "channels"}
MODELS = ("dense", "pruned_before_finetuning", "pruned")


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the first cell of a row says what the row is about.

    `label` says what the table shows to whoever can't see it. `marked` is the row that was
    chosen.
    """

    label: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None


def accuracy_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per attack: name, n, and proportion of each model, p-value where paired."""
    found = record.get("evaluation") or {}
    rows = []
    for attack, name in ATTACK_NAMES.items():
        row: dict[str, Any] = {"attack": attack, "name": name}
        for which in MODELS:
            measured = (found.get(which) or {}).get("measurements", ())
            mine = next((m for m in measured if m["attack"] == attack), None)
            row[which] = mine and mine["accuracy"]
            if mine and (mine.get("details") or {}).get("without_gradient"):
                row["name"] = f"{name}, gradients masked"
        row["p_value"] = ((found.get("paired") or {}).get(attack) or {}).get("p_value")
        if row["dense"] or row["pruned"]:
            rows.append(row)
    return rows


def accuracy_table(record: Mapping[str, Any]) -> Table | None:
    """Return what every attack left of each model, with intervals; None where none was made."""
    found = accuracy_rows(record)
    untuned = any(row["pruned_before_finetuning"] for row in found)
    shown = {"dense": "dense", "pruned_before_finetuning": "un-tuned", "pruned": "pruned"}
    models = {which: name for which, name in shown.items() if untuned or name != "un-tuned"}
    body = tuple(
        (
            row["name"],
            *(percent(row[which]) for which in models),
            "-" if row["p_value"] is None else f"{row['p_value']:.2g}",
        )
        for row in found
    )
    return Table("Accuracy", ("attack", *models.values(), "p"), body) if found else None


def cost_rows(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (what, dense, pruned, removed) for multiply-adds, parameters, channels, latency."""
    dense, pruned = record["cost"]["dense"], record["cost"]["pruned"]
    rows = [
        (name, f"{dense[key]:,}", f"{pruned[key]:,}", f"-{100 * removed(record, key):.1f} %")
        for key, name in COST_NAMES.items()
    ]
    found = record.get("evaluation") or {}
    before = (found.get("dense") or {}).get("latency_ms")
    after = (found.get("pruned") or {}).get("latency_ms")
    if before and after:
        change = f"{100 * (after / before - 1):+.0f} %"
        count = min(32, found["dense"]["n"])
        rows.append((f"ms for {count} images", f"{before:.1f}", f"{after:.1f}", change))
    if timed := record.get("latency"):
        before, after = timed["dense_ms"], timed["pruned_ms"]
        change = f"{100 * (after / before - 1):+.0f} %"
        rows.append((f"ms, {timed['conditions']}", f"{before:.2f}", f"{after:.2f}", change))
    return rows


def key_figures(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (what, how much, in detail) of the few figures that matter most."""
    cost = record["cost"]
    figures = [
        (
            COST_NAMES[key],
            f"\N{MINUS SIGN}{share(removed(record, key))}",
            f"{compact(cost['dense'][key])} \N{RIGHTWARDS ARROW} {compact(cost['pruned'][key])}",
        )
        for key in ("macs", "params")
    ]
    measured = [row for row in accuracy_rows(record) if row["pruned"]]
    for row in measured[:1] + measured[1:][-1:]:
        attack = "accuracy, no attack" if row["attack"] == "clean" else f"accuracy, {row['name']}"
        before = f"dense {share(row['dense']['value'])}" if row["dense"] else ""
        figures.append((attack, share(row["pruned"]["value"]), before))
    return figures


def compact(count: int) -> str:
    """Return `15.5 G`, `4.39 M`, `97.9 k` or `331`."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def removed(record: Mapping[str, Any], key: str) -> float:
    """Return the share of the dense model's `macs`, `params` or `channels` that went."""
    cost = record["cost"]
    return float(1 - cost["pruned"][key] / max(cost["dense"][key], 1))


def percent(accuracy: Mapping[str, Any] | None) -> str:
    """Return `52.0 % [45.1, 58.8]`, or a dash where nothing was measured."""
    if accuracy is None:
        return "-"
    return f"{share(accuracy['value'])} {interval(accuracy)}"


def share(value: float | None) -> str:
    """Return `52.0 %`, or a dash where nothing was measured."""
    return "-" if value is None else f"{100 * value:.1f} %"


def interval(accuracy: Mapping[str, Any]) -> str:
    """Return `[45.1, 58.8]`, in percent."""
    low, high = accuracy["interval"]
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def mrs_rows(sensitivity: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return what has an MRS: the layers, or the groups where it is measured on groups."""
    rows: Sequence[Mapping[str, Any]] = sensitivity["modules"] or sensitivity["groups"]
    return rows


def cost_table(record: Mapping[str, Any]) -> Table:
    """Return what both models cost."""
    return Table("Cost", ("", "dense", "pruned", "change"), tuple(cost_rows(record)))


def channel_table(plan: Mapping[str, Any]) -> Table:
    """Return how many channels every group had and keeps."""
    rows = tuple(
        (
            group["name"],
            f"{group['width']:,}",
            f"{len(group['keep']):,}",
            f"-{100 * (1 - len(group['keep']) / max(group['width'], 1)):.0f} %",
        )
        for group in plan["groups"]
    )
    return Table("Channels of every group", ("group", "dense", "pruned", "change"), rows)


def mrs_table(sensitivity: Mapping[str, Any]) -> Table:
    """Return the MRS of every layer, the group that it decides, and the weights it has."""
    decides = {group["decided_by"]: group["name"] for group in sensitivity["groups"]}
    if not sensitivity["modules"]:
        rows = [(g["name"], f"{g['width']:,}", f"{g['mrs']:.3g}") for g in sensitivity["groups"]]
        return Table("MRS of every group", ("group", "channels", "MRS (nats)"), tuple(rows))
    of_layers = tuple(
        (m["name"], f"{m['params']:,}", f"{m['mrs']:.3g}", decides.get(m["name"], ""))
        for m in sensitivity["modules"]
    )
    head = ("layer", "parameters", "MRS (nats)", "decides group")
    return Table("MRS of every layer", head, of_layers)


def search_table(search: Mapping[str, Any]) -> Table:
    """Return the candidates of the allocation; the one that was taken is marked."""
    rows = tuple(
        (
            f"{number}{' (taken)' if number == search['chosen'] + 1 else ''}",
            f"{candidate['loss']:.3f}",
            f"{candidate['params']:,}",
        )
        for number, candidate in enumerate(search["candidates"], 1)
    )
    head = ("candidate", "loss (nats)", "parameters left")
    return Table("Candidates of the allocation", head, rows, search["chosen"])


def drop_table(found: Mapping[str, Any]) -> Table:
    """Return what every ratio of a search cost; the one that was taken is marked."""
    rows = []
    for one in found["tried"]:
        low, high = one["interval"]
        taken = " (taken)" if one["prune_ratio"] == found["chosen"] else ""
        rows.append(
            (
                f"{one['prune_ratio']:g}{taken}",
                f"{100 * one['drop']:+.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                f"{one['images']:,}",
                "within" if one["within"] else "beyond",
            )
        )
    marked = [one["prune_ratio"] for one in found["tried"]].index(found["chosen"])
    head = ("ratio", "points lost", "images", "")
    return Table("Ratios that were tried", head, tuple(rows), marked)


def step_table(record: Mapping[str, Any]) -> Table:
    """One row for each pruning step: what was left, and the epoch that was gone on with."""
    dense = record["cost"]["dense"]["macs"]
    steps = [(step["plan"]["pruned"]["macs"], step["finetune"]) for step in record["steps"]]
    steps.append((record["cost"]["pruned"]["macs"], record["finetune"]))
    rows = []
    for number, (macs, history) in enumerate(steps, 1):
        best = history["epochs"][history["best_epoch"]] if history and history["epochs"] else None
        rows.append(
            (
                str(number),
                f"{macs:,} ({100 * macs / dense:.1f} %)",
                str(len(history["epochs"]) - 1) if history else "0",
                share(best and best["clean"]),
                share(best and best["robust"]),
            )
        )
    head = ("step", "multiply-adds left", "epochs", "clean, validation", "robust, validation")
    return Table("Pruning steps", head, tuple(rows))


def training_table(history: Mapping[str, Any]) -> Table:
    """One row for each epoch; the one whose weights were kept is marked."""
    single = any(e.get("single_step") is not None for e in history["epochs"])
    rows = tuple(
        (
            f"{e['epoch']}{' (kept)' if e['epoch'] == history['best_epoch'] else ''}",
            "-" if e["loss"] is None else f"{e['loss']:.4f}",
            share(e["clean"]),
            *([share(e.get("single_step"))] if single else []),
            share(e["robust"]),
            f"{e['seconds']:.0f}",
            f"{e.get('images_per_second') or 0:.0f}",
        )
        for e in history["epochs"]
    )
    head = ("epoch", "loss", "clean", *(["FGSM"] if single else []), "robust", "seconds")
    return Table("Epochs", (*head, "images/s"), rows, _kept(history))


def _kept(history: Mapping[str, Any]) -> int | None:
    epochs = [e["epoch"] for e in history["epochs"]]
    return epochs.index(history["best_epoch"]) if history["best_epoch"] in epochs else None


def seconds_table(seconds: Mapping[str, float]) -> Table:
    """Return how long every station took, the longest first."""
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    rows = tuple((name, f"{value:,.1f}") for name, value in ranked)
    return Table("Seconds of every station", ("station", "seconds"), rows)


def pairs_table(label: str, values: Mapping[str, Any]) -> Table:
    """Return nested settings as pairs of a dotted name and a value: a text as it is, or JSON."""
    return Table(label, ("name", "value"), tuple(_flat(values, "")))


def _flat(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for name, value in sorted(values.items()):
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{above}{name}", text
