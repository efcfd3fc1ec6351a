"""Other programs' formats: ONNX and torch.export, for any batch size, checked before they stay."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robust_prune.errors import ModelError, UsageError
from robust_prune.modules import copied, difference

Format = Literal["onnx", "torch-export"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
OPSET = 20
TOLERANCE = 1e-3
BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class Exported:
    """A written file, and how far its outputs are from the module's.

    `error` is the largest difference over the largest logit, in float32; None where no runtime to
    check with is installed.
    """

    path: Path
    format: str
    error: float | None
    batches: tuple[int, ...]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: Format,
    input_size: tuple[int, int, int],
) -> Exported:
    """Write a model, with its normalisation, for use without this package.

    The file takes images [N, C, H, W] in [0, 1] of this size, float32, any N, and gives logits.
    It is written to a temporary place, run on batches of 1, 2 and 5 random images, and moved to
    `path` only if its logits are the module's.

    Raises:
        UsageError: the format is not known, or `onnx` is asked for without its packages.
        ModelError: the model can't be exported, or the file does not do what the module does.
    """
    if to not in SUFFIXES:
        raise UsageError(f"format {to!r} is not known; use one of {', '.join(SUFFIXES)}")
    path = Path(path)
    exact = copied(model).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(n, *input_size, generator=generator) for n in BATCHES]
    try:
        drafts = tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-")
    except OSError as fault:
        raise ModelError(f"{path.parent}: can't write there: {fault.strerror}") from None
    with drafts as folder:
        draft = Path(folder) / path.name
        with quiet(), torch.no_grad():
            try:
                run = (
                    _onnx(exact, images[1], draft)
                    if to == "onnx"
                    else _pt2(exact, images[1], draft)
                )
            except (UsageError, ModelError):
                raise
            except Exception as fault:
                line = (str(fault).strip().splitlines() or [""])[0][:200]
                raise ModelError(
                    f"the model can't be exported to {to}: {type(fault).__name__}: {line}"
                ) from fault
            error = None if run is None else max(difference(run(x), exact(x)) for x in images)
        if error is not None and not error <= TOLERANCE:
            raise ModelError(
                f"the exported {to} file gives other logits than the module, by {error:.1e} of "
                f"the largest; the limit is {TOLERANCE:g}; nothing was written"
            )
        draft.replace(path)
    return Exported(path, to, error, BATCHES if run is not None else ())


def require(*packages: str) -> None:
    """Raise a UsageError that says what to install where a package is missing."""
    missing = [n for n in packages if importlib.util.find_spec(n) is None]
    if missing:
        raise UsageError(
            f"ONNX needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: pip "
            "install 'robust-prune[export]'"
        )


class OnnxModel(nn.Module):
    """An ONNX file of ours as a module on images [N, C, H, W], by ONNX Runtime on a CPU.

    Its logits have no gradient.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        super().__init__()
        require("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, K]."""
        found = self.session.run(None, {"images": images.detach().cpu().numpy()})[0]
        return torch.from_numpy(found)


def _onnx(model: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor] | None:
    require("onnx", "onnxscript")
    torch.onnx.export(
        model,
        (images,),
        str(path),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        external_data=False,
        verbose=False,
    )
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    return OnnxModel(path)


def _pt2(model: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    torch.export.save(program, path)
    again: Any = torch.export.load(path).module()
    return lambda x: again(x)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' progress reports off the terminal; their errors still rise."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)
