"""Options are stated once: every reader finds a new one, and refuses what it can't be."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import robust_prune
from robust_prune import compress
from robust_prune.errors import UsageError
from robust_prune.options import (
    BudgetOptions,
    ComparingOptions,
    DataOptions,
    EvaluationOptions,
    FineTuningOptions,
    ModelOptions,
    NewTrainingOptions,
    OutputOptions,
    PlanningOptions,
    QuantisingOptions,
    RunOptions,
    SensitivityOptions,
    ThreatOptions,
    TrainingOptions,
    chosen,
    reference,
    stated,
    takes,
)

GROUPS = (
    BudgetOptions,
    ComparingOptions,
    DataOptions,
    EvaluationOptions,
    FineTuningOptions,
    ModelOptions,
    NewTrainingOptions,
    OutputOptions,
    PlanningOptions,
    QuantisingOptions,
    RunOptions,
    SensitivityOptions,
    ThreatOptions,
    TrainingOptions,
)

READERS = """
import contextlib, inspect, io, sys
import robust_prune
from robust_prune.options import PlanningOptions, reference
from robust_prune.pipeline import Settings, plain_settings
assert robust_prune.__file__.startswith({folder!r}), robust_prune.__file__
assert inspect.signature(robust_prune.compress).parameters["glitter"].default == 3
assert plain_settings(Settings())["glitter"] == 3
assert "`glitter`" in reference(PlanningOptions)
from robust_prune.cli import main
sys.argv = ["robust-prune", "compress", "--help"]
told = io.StringIO()
with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
    main()
assert "--glitter" in told.getvalue() and "How much it shines." in told.getvalue()
sys.argv = ["robust-prune", "compress", "none.pt", "--ratio", "0.5", "--glitter", "9"]
main()
"""


def test_a_new_option_is_one_line_and_every_reader_has_it(tmp_path: Path) -> None:
    copy = tmp_path / "robust_prune"
    shutil.copytree(Path(robust_prune.__file__).parent, copy)
    groups = copy / "options" / "planning.py"
    line = '    glitter: int = option(3, "How much it shines.", within=Range(0, 5))\n'
    text = groups.read_text()
    before = "    allocation: str = option("
    assert text.count(before) == 1
    groups.write_text(text.replace(before, line + before))
    run = subprocess.run(
        [sys.executable, "-c", READERS.format(folder=str(tmp_path))],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert run.stderr == "error: glitter 9 must be in [0, 5]\n"


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_says_what_it_is(group: type[Any]) -> None:
    said = stated(group)
    assert set(said) == {f.name for f in fields(group)}
    for name, what in said.items():
        assert what.help.endswith("."), name
    assert group() is not None, "defaults are among the values that are allowed"
    assert len(reference(group).splitlines()) == 2 + len(said)


@pytest.mark.parametrize(
    ("group", "wrong", "message"),
    [
        (RunOptions, {"seed": 2**63}, r"seed 9.22337e\+18 must be in \[0, "),
        (RunOptions, {"seed": -1}, "seed -1 must be in"),
        (RunOptions, {"seed": True}, "seed must be a number, not True"),
        (RunOptions, {"device": "tpu"}, "use one of auto, cpu, cuda"),
        (BudgetOptions, {"prune_ratio": 0.0}, r"prune ratio 0 must be in \(0, 1\)"),
        (BudgetOptions, {"prune_ratio": 50}, "between 0 and 1"),
        (BudgetOptions, {"prune_ratio": "half"}, "prune ratio must be a number, not 'half'"),
        (BudgetOptions, {"target": "flops"}, "macs, params, channels"),
        (TrainingOptions, {"lr": math.nan}, "learning rate nan must be positive"),
        (TrainingOptions, {"lr": math.inf}, "learning rate inf must be"),
        (TrainingOptions, {"lr": -1.0}, "learning rate -1 must be positive"),
        (TrainingOptions, {"ema": 1.0}, r"ema 1 must be in \[0, 1\); 0.999 is usual"),
        (FineTuningOptions, {"batch_size": 1}, "batch size 1 must be 2 or more"),
        (SensitivityOptions, {"rho": 0}, "rho 0 must be positive"),
        (ModelOptions, {"mean": "a,b"}, "numbers separated by commas"),
        (ModelOptions, {"input_size": "3,32"}, "channels,height,width"),
    ],
)
def test_a_value_that_can_not_be_is_one_line(
    group: type[Any], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        group(**wrong)
    assert "\n" not in str(caught.value)


def test_text_of_the_command_line_becomes_values() -> None:
    options = ModelOptions(mean="0.5,0.25", input_size="3x32x16", model_kwargs='{"a": 1}')
    assert (options.mean, options.input_size) == ((0.5, 0.25), (3, 32, 16))
    assert options.model_kwargs == {"a": 1}


def test_a_subclass_states_another_default_and_nothing_else() -> None:
    assert (TrainingOptions().ema, FineTuningOptions().ema) == (0.0, 0.999)
    assert stated(TrainingOptions)["ema"] is stated(FineTuningOptions)["ema"]
    assert chosen(TrainingOptions, FineTuningOptions(ema=0.5))["ema"] == 0.5


def test_a_function_takes_only_names_that_there_are() -> None:
    @takes(BudgetOptions, renamed={"share": "prune_ratio"})
    def ask(model: str, **options: Any) -> dict[str, Any]:
        return options

    assert ask("m", prune_ratio=0.3) == {"prune_ratio": 0.3}
    with pytest.warns(DeprecationWarning, match="'share' is now 'prune_ratio'"):
        assert ask("m", share=0.3) == {"prune_ratio": 0.3}
    with pytest.raises(UsageError, match="'prune_ration' is not known; did you mean 'prune_ratio'"):
        ask("m", prune_ration=0.3)


def test_compress_says_its_options() -> None:
    import inspect

    names = list(inspect.signature(compress).parameters)
    assert names[:2] == ["model", "data"]
    assert {"prune_ratio", "round_to", "momentum", "n_eval", "threat"} <= set(names)
    assert "options" not in names
