"""Models for the Hugging Face Hub: folders, cards and repositories, without a network."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError

import robust_prune as rp
from robust_prune import report
from robust_prune.cli import app
from robust_prune.errors import ModelError, UsageError
from robust_prune.models import open_model
from tests.conftest import OwnNet, tiny_resnet
from tests.report.test_report import record as made_up

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def result() -> Any:
    images, labels = torch.rand(24, 3, 32, 32), torch.randint(0, 10, (24,))
    data = [(images, labels)]
    return rp.compress(
        tiny_resnet(), data, allocation="uniform", test=data, evaluation="pgd", n_eval=8
    )


@pytest.fixture
def folder(result: Any, tmp_path: Path) -> Path:
    return rp.save_pretrained(result.model, tmp_path / "small", result.report)


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What the Hub has, by name; downloads give only the files that were asked for."""
    there: dict[str, Path] = {}

    def snapshot_download(
        name: str, *, allow_patterns: list[str], revision: str | None = None, **options: Any
    ) -> str:
        if name not in there:
            raise LocalEntryNotFoundError("no connection")
        assert revision in (None, "main", COMMIT)
        kept = tmp_path / "cache" / COMMIT
        kept.mkdir(parents=True, exist_ok=True)
        for file in allow_patterns:
            if (there[name] / file).exists():
                shutil.copy(there[name] / file, kept / file)
        return str(kept)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return there


def test_a_folder_gives_the_model_and_its_report_back(result: Any, folder: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    again, record = open_model(folder)
    assert torch.equal(again(images), result.model(images))
    assert torch.equal(rp.from_pretrained(folder)(images), result.model(images))
    assert record["plan_digest"] == result.plan.digest
    config = json.loads((folder / "config.json").read_text())
    assert config["library_name"] == "robust-prune"
    assert config["model"]["arch"] == "resnet18"


def test_the_card_has_every_figure_with_its_interval(result: Any, folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "robust-prune"
    named = {entry.metric_name: entry.metric_value for entry in card.data.eval_results}
    for row in report.accuracy_rows(result.report):
        assert f"| {row['name']} | {report.percent(row['dense'])}" in card.text
        assert report.percent(row["pruned"]) in card.text
        assert row["pruned"]["value"] in named.values()
    assert "n = 8 test images" in card.text
    assert "linf 8/255, seed 0" in card.text
    assert f"{result.plan.dense.macs:,} | {result.plan.pruned.macs:,}" in card.text
    assert 'robust_prune.load("hf-hub:OWNER/NAME")' in card.text


def test_a_card_is_kept_beside_the_same_weights_only(result: Any, folder: Path) -> None:
    (folder / "README.md").write_text("edited")
    rp.save_pretrained(result.model, folder, result.report)
    assert (folder / "README.md").read_text() == "edited"
    rp.save_pretrained(tiny_resnet(1), folder)
    assert "# resnet18\n" in (folder / "README.md").read_text()


def test_names_from_elsewhere_are_no_markup_in_a_card() -> None:
    bad = "<script>x</script>|[a](http://b)`\n---\nlicense: mit"
    text = report.to_card({**made_up(bad), "model": {"arch": bad, "source": "timm"}})
    assert "<script>" not in text
    front, _, body = text.partition("\n---\n")
    assert "](http" not in body
    assert "\nlicense" not in front
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (5, 6)


def test_model_info_has_the_fields_of_robustbench() -> None:
    record = {**made_up("x"), "data_name": "cifar10", "model": {"arch": "resnet18"}}
    info = report.model_info(record)
    assert (info["clean_acc"], info["autoattack_acc"], info["eps"]) == ("78.00", "40.00", "8/255")
    assert info["dataset"] == "cifar10"
    assert info["unreliable"] is True  # AutoAttack has said something
    assert info["link"] is None
    assert "on 100 test images; RobustBench takes 10,000" in info["footnote"]
    untested = report.model_info({**record, "evaluation": {"pruned": None}})
    assert untested["autoattack_acc"] is None
    assert untested["unreliable"] is None


def test_paths_of_this_machine_stay_here(result: Any, tmp_path: Path) -> None:
    data = {"data": "/home/me/pictures", "data_root": "/home/me", "split_seed": 0}
    rp.save_pretrained(result.model, tmp_path / "m", {**result.report, "data": data})
    for path in (tmp_path / "m").iterdir():
        assert b"/home/me" not in path.read_bytes()
    assert open_model(tmp_path / "m")[1]["data"]["data"] == "pictures"


def test_a_class_of_ones_own_takes_the_stored_widths(tmp_path: Path) -> None:
    small = rp.compress(
        OwnNet().eval(), None, allocation="uniform", input_size=(3, 8, 8), calibration_images=8
    )
    rp.save_pretrained(small.model, tmp_path / "own", small.report)
    again = rp.from_pretrained(tmp_path / "own", model=OwnNet())
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(again(images), small.model(images))
    assert "model=YourClass()" in (tmp_path / "own" / "README.md").read_text()
    with pytest.raises(ModelError, match="a class that only you can build"):
        rp.load(tmp_path / "own")


def test_load_takes_repositories_of_ours(
    result: Any, folder: Path, repositories: dict[str, Path]
) -> None:
    repositories["me/small"] = folder
    images = torch.rand(2, 3, 32, 32)
    for model in (
        rp.load("hf-hub:me/small"),
        rp.load("hf-hub:me/small@main"),
        rp.from_pretrained("me/small", revision="main"),
    ):
        assert torch.equal(model(images), result.model(images))


def test_timms_repositories_are_still_timms(
    tmp_path: Path, repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timms").mkdir()
    (tmp_path / "timms" / "config.json").write_text('{"architecture": "resnet18"}')
    repositories["timm/resnet18"] = tmp_path / "timms"
    asked: list[str] = []

    def resolve(name: str, *arguments: Any, **options: Any) -> Any:
        asked.append(name)
        raise ModelError("timm was asked")

    monkeypatch.setattr("robust_prune.models.loading.resolve_spec", resolve)
    with pytest.raises(ModelError, match="timm was asked"):
        rp.load("hf-hub:timm/resnet18")
    assert asked == ["hf-hub:timm/resnet18"]
    with pytest.raises(ModelError, match="is not of robust-prune"):
        rp.from_pretrained("timm/resnet18")


def test_strangers_repositories_are_checked_as_files_are(
    folder: Path, repositories: dict[str, Path]
) -> None:
    repositories["you/bad"] = folder
    config = json.loads((folder / "config.json").read_text())
    config["model"]["arch"] = "resnet50"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="different networks"):
        rp.load("hf-hub:you/bad")
    (folder / "config.json").write_text('{"library_name": "robust-prune"}')
    torch.save(tiny_resnet(), folder / "model.safetensors")  # a pickle
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        rp.load("hf-hub:you/bad")
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder.parent / "cache")
    with pytest.raises(ModelError, match=r"it has no model\.safetensors"):
        rp.load("hf-hub:you/bad")


@pytest.mark.parametrize(
    ("name", "said"), [("hf-hub:you/none", "can't be reached"), ("hf-hub:a/b/c", "OWNER/NAME")]
)
def test_what_the_hub_says_is_one_line(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=said) as caught:
        rp.load(name)
    assert "\n" not in str(caught.value)


def test_pushing_uploads_the_folder_with_its_own_name_in_the_card(
    result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, name: str, **options: Any) -> Any:
            sent.update(options)
            return type("Made", (), {"repo_id": name})

        def upload_folder(self, *, folder_path: Path, repo_id: str, **options: Any) -> str:
            sent["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = rp.push_to_hub(result.model, "me/small", result.report, private=True, token="t")
    assert address == "https://huggingface.co/me/small/commit/1"
    assert set(sent["files"]) == {
        "config.json", "model.safetensors", "README.md", "model_info.json",
    }  # fmt: skip
    assert b'load("hf-hub:me/small")' in sent["files"]["README.md"]
    assert (sent["token"], sent["private"], sent["exist_ok"]) == ("t", True, True)


def test_the_command(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    rp.save(result.model, "small.safetensors", result.report)
    command = ["export", "small.safetensors", "--format", "hub"]
    app(command, standalone_mode=False)
    assert "hf upload OWNER/NAME small-hub" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--force"):
        app(command, standalone_mode=False)
    app([*command, "--force"], standalone_mode=False)
    app(["info", "small-hub"], standalone_mode=False)
    assert result.plan.digest in capsys.readouterr().out
