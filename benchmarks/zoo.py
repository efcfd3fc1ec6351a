"""Every model family of timm and torchvision: prune to half the multiply-adds, prove it, reload it.

    python -m benchmarks.zoo --out benchmarks/records/zoo --jobs 2

One process per network and engine, with a time limit, one thread each. `--only NAME` repeats a
part, `--engines ENGINE` runs some columns alone, `--resume` leaves out what the folder's log has:
the table takes the last result of each. What `READ_FIRST.md` in the folder says is put before it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MEMBERS = Path(__file__).with_name("zoo_members.json")
TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet
    inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18
    resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn
    vit_b_16 wide_resnet50_2
""".split()  # noqa: SIM905
LIMIT_S = 400
PLAIN_LIMIT_S = 90
ENGINES = ("ours", "plain", "graph-l2", "graph-mrs")
RATIO = 0.5


def members() -> dict[str, str]:
    """Return the smallest network of each of timm's families (files) by parameters."""
    import timm
    from timm.models import _registry

    if MEMBERS.exists():
        stored = json.loads(MEMBERS.read_text())
        if stored["timm"] == timm.__version__:
            return dict(stored["families"])
    import torch

    sizes: dict[str, tuple[int, str]] = {}
    failed: dict[str, str] = {}
    for name in timm.list_models(exclude_filters="test_*"):  # toys of timm's own tests
        family = _registry._model_to_module[name]
        try:
            with torch.device("meta"):
                net = timm.create_model(name)
        except Exception as error:  # noqa: BLE001
            failed[family] = f"{name}: {error}"
            continue
        size = sum(p.numel() for p in net.parameters())
        if family not in sizes or size < sizes[family][0]:
            sizes[family] = size, name
    families = {family: name for family, (_, name) in sorted(sizes.items())}
    for family in failed.keys() - families.keys():
        families[family] = failed[family].split(":")[0]
    MEMBERS.write_text(
        json.dumps({"timm": timm.__version__, "families": families}, indent=1, sort_keys=True)
    )
    return families


def ours(arch: str) -> dict[str, Any]:
    """Prune one network by this package; every figure of its row."""
    import torch

    import robust_prune as rp
    from robust_prune.allocation import Problem, allocate_evenly, make_plan
    from robust_prune.criteria import channel_scores
    from robust_prune.graph import ModelGraph, masking_error
    from robust_prune.models import build_model, default_input_size, resolve_spec
    from robust_prune.types import Budget

    torch.manual_seed(0)
    spec = resolve_spec(arch)
    model = build_model(spec).eval()
    enliven_(model.net)
    size = default_input_size(spec)
    row: dict[str, Any] = {"input": "x".join(map(str, size))}
    start = time.perf_counter()
    with torch.no_grad():
        model(torch.rand(1, *size))
    row["forward_s"] = time.perf_counter() - start
    start = time.perf_counter()
    graph = ModelGraph(model, size)
    row["graph_s"] = time.perf_counter() - start
    problem = Problem(graph.groups, graph.cost, Budget("macs", RATIO))
    widths = allocate_evenly(problem)
    scores = channel_scores(model, graph, score="l2")
    plan = make_plan(
        problem,
        widths,
        {name: values.tolist() for name, values in scores.items()},
        allocation="uniform",
        score="l2",
        seed=0,
        input_size=size,
        ties=graph.ties,
    )
    row |= {
        "groups": len(graph.groups),
        "unprunable": len(graph.unprunable),
        "reachable": graph.reachable,
        "macs": plan.dense.macs,
        "params": plan.dense.params,
        "reached": plan.reached,
        "params_removed": 1 - plan.pruned.params / plan.dense.params,
    }
    import copy

    dense = copy.deepcopy(model)
    graph.apply_(plan)
    row["total_s"] = time.perf_counter() - start
    n = 2 if row["forward_s"] < 2 else 1
    images = torch.rand(n, *size, generator=torch.Generator().manual_seed(1))
    row["masking_error"] = masking_error(dense, model, plan, images)
    with tempfile.TemporaryDirectory() as folder:
        path = rp.save(model, Path(folder) / "pruned.safetensors")
        again = rp.load(path)
    with torch.no_grad():
        logits = model(images)
        row["finite"] = bool(logits.isfinite().all())
        row["reload_equal"] = torch.equal(again(images), logits)
    model.train()
    loss = model(images).square().mean()
    loss.backward()
    row["backward"] = all(
        bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None
    )
    row["pass"] = bool(
        abs(row["reached"] - RATIO) <= 0.01
        and row["masking_error"] < 1e-6
        and row["finite"]
        and row["reload_equal"]
        and row["backward"]
    )
    return row


def enliven_(net: Any) -> None:
    """Start no branch at zero and no norm at the identity, where errors would not show.

    Buffers that no file stores are constants of the code, and stay.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, tensor in net.state_dict(keep_vars=True).items():
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensor.data.normal_(0, 0.1, generator=generator)
        elif tensor.ndim == 1 and isinstance(tensor, torch.nn.Parameter):
            tensor.data.uniform_(0.5, 1, generator=generator)


def plain(arch: str) -> dict[str, Any]:
    """Prune one network by torch-pruning alone: L2, local; the channel ratio that halves MACs."""
    import torch
    import torch_pruning as tp

    from robust_prune.models import build_model, default_input_size, resolve_spec

    spec = resolve_spec(arch)
    size = default_input_size(spec)
    images = torch.rand(1, *size)
    low, high, row = 0.0, 0.9, {}
    for _ in range(6):
        ratio = (low + high) / 2
        torch.manual_seed(0)
        net = build_model(spec).net.eval()
        heads = [m for m in net.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
        dense, _ = tp.utils.count_ops_and_params(net, images)
        pruner = tp.pruner.BasePruner(
            net,
            images,
            tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=ratio,
            ignored_layers=[m for m in heads if getattr(m, "out_features", 0) == spec.num_classes],
            in_channel_groups={},
            out_channel_groups={},
        )
        pruner.step()
        out = net(images)
        out.square().mean().backward()
        left, _ = tp.utils.count_ops_and_params(net, images)
        row = {"reached": 1 - left / dense, "channel_ratio": ratio}
        if abs(row["reached"] - RATIO) <= 0.01:
            break
        low, high = (ratio, high) if row["reached"] < RATIO else (low, ratio)
    row["pass"] = abs(row["reached"] - RATIO) <= 0.01
    return row


def run(engine: str, arch: str) -> dict[str, Any]:
    """Prune one network by one engine."""
    if engine == "ours":
        return ours(arch)
    if engine == "plain":
        return plain(arch)
    from benchmarks.zoo_pruners import on_our_graph

    return on_our_graph(arch, engine.removeprefix("graph-"), enliven_)


def work(engine: str, arch: str) -> None:
    """Run one network in this process, and print its row."""
    start = time.perf_counter()
    try:
        row = run(engine, arch)
    except Exception as error:  # noqa: BLE001 (a row for every failure)
        # the record names no folder of the machine that made it
        text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[^/\s]+/", "", str(error))
        line = (text.splitlines() or [""])[0][:200]
        row = {"pass": False, "error": f"{type(error).__name__}: {line}"}
    row["seconds"] = time.perf_counter() - start
    row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("ROW " + json.dumps(row))


def launch(engine: str, arch: str, limit: int) -> dict[str, Any]:
    """Run one network in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.zoo", "--work", engine, arch]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"pass": False, "error": f"no result in {limit} s", "seconds": limit}
    for line in done.stdout.splitlines():
        if line.startswith("ROW "):
            row: dict[str, Any] = json.loads(line.removeprefix("ROW "))
            return row
    tail = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    return {"pass": False, "error": f"exit {done.returncode}: {tail}"}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the record's table."""
    lines = [
        "| family | network | groups | reachable | MACs removed | masking error | reload | "
        "graph s | with plan and prune s | verdict | torch-pruning | on our graph, L2 | "
        "on our graph, MRS |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family, row in rows.items():
        mine = row["ours"]
        other = " | ".join(verdict(row.get(engine) or {}) for engine in ENGINES[1:])
        if "error" in mine:
            lines.append(f"| {family} | {row['arch']} | | | | | | | | {mine['error']} | {other} |")
            continue
        lines.append(
            f"| {family} | {row['arch']} | {mine['groups']} | {100 * mine['reachable']:.0f} % | "
            f"{100 * mine['reached']:.1f} % | {mine['masking_error']:.0e} | "
            f"{'equal' if mine['reload_equal'] else 'differs'} | {mine['graph_s']:.1f} | "
            f"{mine['total_s']:.1f} | {'pass' if mine['pass'] else 'fails'} | {other} |"
        )
    return "\n".join(lines)


def verdict(row: dict[str, Any]) -> str:
    """Return what became of one network, in a word or two."""
    if not row:
        return "not run"
    if row["pass"]:
        return "pass" if "classifier" not in row else "pass, with a classifier"
    wrong = [key for key in ("reload_equal", "backward") if row.get(key) is False]
    if wrong:
        return f"fails: {', '.join(wrong)}"
    if "masking_error" in row and abs(row["reached"] - RATIO) <= 0.05:
        return f"masking error {row['masking_error']:.0e}"
    return f"{100 * row['reached']:.1f} %" if "reached" in row else str(row.get("error", ""))


def passes(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how many networks pass by each engine that was tried on any."""
    words = {
        "ours": f"{{}} of {len(rows)} pass",
        "plain": "torch-pruning alone: {}",
        "graph-l2": "its `BasePruner` on our graph with L2: {}",
        "graph-mrs": "with MRS: {}",
    }
    tried = [engine for engine in words if any(engine in row for row in rows.values())]
    count = {e: sum(bool(r.get(e, {}).get("pass")) for r in rows.values()) for e in tried}
    return f"{title}: " + "; ".join(words[e].format(count[e]) for e in tried)


def settings() -> list[str]:
    """Return what the rows were made with."""
    from importlib.metadata import version

    import torch

    from robust_prune.models import library_versions
    from robust_prune.pipeline import hardware

    found = {**library_versions(), "torch-pruning": version("torch-pruning")}
    return [
        "Smallest network of each family by parameters, timm's own input size, random weights, one "
        "thread each. Ours: uniform allocation, L2, 50 % of the multiply-adds within one point, "
        "equal to the masked model in float64 within 1e-6, reloaded bit-equal, backward pass "
        f"finite; at most {LIMIT_S} s. torch-pruning alone: `BasePruner`, group L2, local, the "
        "channel ratio bisected in 6 steps to 50 % of its own count within one point, forward and "
        f"backward; at most {PLAIN_LIMIT_S} s; whether it equals masking is not asked. On our "
        "graph: the same pruner inside `dependency_graph()`, at the channel ratio that halves our "
        "count within five points, with L2 or `MRSImportance` (no floor, as L2 has none; a network "
        "that ends before a classifier is given one, as MRS needs); forward, backward, equal to "
        f"the masked model in float64 within 1e-6, reloaded bit-equal; at most {LIMIT_S} s.",
        "",
        f"`make bench-zoo`; {json.dumps(found)}; {json.dumps(hardware(torch.device('cpu')))}",
    ]


def main() -> None:
    """Run the zoo and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/records/zoo"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds for one network")
    parser.add_argument("--only", nargs="*", default=[], help="families or networks, in this order")
    parser.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES)
    parser.add_argument("--resume", action="store_true", help="leave out what the log has")
    parser.add_argument("--work", nargs=2, metavar=("ENGINE", "ARCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    archs = members() | {f"torchvision/{name}": f"torchvision/{name}" for name in TORCHVISION}
    by_arch = {arch: family for family, arch in archs.items()}
    asked = [by_arch.get(name, name) for name in options.only] or list(archs)
    todo = {family: archs[family] for family in asked}
    options.out.mkdir(parents=True, exist_ok=True)
    stored = options.out / "log.jsonl"
    earlier = [json.loads(line) for line in stored.open()] if stored.exists() else []
    rows: dict[str, dict[str, Any]] = {}
    for row in earlier:
        family = row.pop("family")
        rows[family] = {**rows.get(family, {}), **row}
    log = stored.open("a")

    def one(item: tuple[str, str]) -> None:
        family, arch = item
        row: dict[str, Any] = {"arch": arch}
        for engine in options.engines:
            if options.resume and engine in rows.get(family, {}):
                continue
            most = min(options.limit, PLAIN_LIMIT_S) if engine == "plain" else options.limit
            row[engine] = launch(engine, arch, most)
            print(f"{family} {arch}: {engine}: {verdict(row[engine])}", flush=True)
        rows[family] = {**rows.get(family, {}), **row}
        log.write(json.dumps({"family": family, **row}) + "\n")
        log.flush()

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, todo.items()))
    rows = {family: rows[family] for family in archs if "ours" in rows.get(family, {})}
    timm_rows = {f: r for f, r in rows.items() if not f.startswith("torchvision/")}
    summary = [passes("timm families", timm_rows), passes("all", rows)]
    words = options.out / "READ_FIRST.md"
    first = [words.read_text().strip(), ""] if words.exists() else []
    lines = [f"- {line}" for line in summary]
    text = "\n".join(["# Zoo", "", *first, *lines, "", *settings(), "", table(rows), ""])
    (options.out / "README.md").write_text(text)
    print("\n".join(summary))


if __name__ == "__main__":
    main()
