"""What a training run is made of before its first batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from torch import Tensor, nn

from robust_prune.adversaries import Folded
from robust_prune.data import Split
from robust_prune.distributed import Processes
from robust_prune.errors import TrainingError, UsageError
from robust_prune.finetune.attack import Attack, Method
from robust_prune.finetune.config import TrainingConfig
from robust_prune.finetune.registry import bind, is_single_step, needs_teacher, resolve_method
from robust_prune.modules import check_outputs, device_of, outputs_of


@dataclass(frozen=True)
class Prepared:
    """What stays the same through a run.

    Attributes:
        config: the run.
        name: of the training method that was asked for.
        method: its function, with the teacher bound to it where it needs one.
        single_step: whether it attacks with one step, and so can collapse.
        images: [N, C, H, W], to validate on.
        labels: [N].
        device: where the model is.
        layout: of image batches in memory.
        amp: forward passes in bfloat16.
        batches: of an epoch.
        attack: what the method is handed, at the full eps.
    """

    config: TrainingConfig
    name: str
    method: Method
    single_step: bool
    images: Tensor
    labels: Tensor
    device: torch.device
    layout: torch.memory_format
    amp: bool
    batches: int
    attack: Attack

    @property
    def how(self) -> str:
        """What the settings left to the device and the model, in words."""
        attack, config = self.attack, self.config
        folded = "" if attack.folded is None else ", batch norms folded into convolutions"
        average = f"; weights averaged at {config.ema:g}" if config.ema else ""
        kind = "single steps" if self.single_step else f"PGD-{attack.steps}"
        return (
            f"{config.optimizer}, peak rate {config.lr:g}, {config.schedule}; {kind} against "
            f"{attack.batchnorm}-mode batch norms in "
            f"{self._numbers(attack.bfloat16 or self.amp)}{folded}; training passes "
            f"in {self._numbers(self.amp)}{average}"
        )

    def _numbers(self, bfloat16: bool) -> str:
        if not bfloat16:
            return "float32"
        emulated = not native_bfloat16(self.device) and self.device.type in ("cpu", "cuda")
        if self.device.type == "cpu":
            emulated &= torch.cpu.get_capabilities().get("architecture") == "x86_64"
        return "bfloat16 (emulated here: slower than float32)" if emulated else "bfloat16"


def prepare(
    model: nn.Module,
    training: Split,
    validation: Split,
    config: TrainingConfig,
    teacher: nn.Module | None,
    processes: Processes,
) -> Prepared:
    """Check that a run can be, and return what it needs; the model is put into its layout.

    Raises:
        UsageError: a method that distils has no fitting teacher, or the layout can't be used.
    """
    device, (name, method) = device_of(model), resolve_method(config.method)
    images, labels = validation.take(min(config.validation_images, len(validation)), config.seed)
    check_outputs(model, images, labels)
    if needs_teacher(method):
        method = _bound(name, method, teacher, outputs_of(model, images), images)
    layout = layout_of(model, config)
    attack = Attack(
        config.threat,
        config.attack_steps,
        torch.Generator(),
        label_smoothing=config.label_smoothing,
        batchnorm=config.attack_batchnorm,
        folded=folded_copy(model, config, images[:4]),
        bfloat16=attacks_in_bfloat16(config, device),
    )
    return Prepared(
        config=config,
        name=name,
        method=method,
        single_step=is_single_step(name),
        images=images,
        labels=labels,
        device=device,
        layout=layout,
        amp=uses_bfloat16(config, device),
        batches=batches_of(len(training), config.batch_size, processes.size),
        attack=attack,
    )


def _bound(
    name: str, method: Method, teacher: nn.Module | None, outputs: int, images: Tensor
) -> Method:
    """Return a method that distils with its teacher, which must have the model's outputs."""
    if teacher is None:
        raise UsageError(f"{name} learns from the dense model; give it as teacher")
    theirs = outputs_of(teacher, images)
    if theirs != outputs:
        raise UsageError(
            f"{name} needs a teacher of the same classes: it has {theirs} outputs, the model "
            f"{outputs}"
        )
    return bind(method, teacher)


def check_optimizer(name: str) -> None:
    """Raise a UsageError where timm has no optimizer of this name."""
    try:
        get_optimizer_info(name.lower().removeprefix("lookahead_"))
    except ValueError:
        raise UsageError(f"optimizer {name!r} is not known; sgd and adamw are usual") from None


def optimizer_of(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer; biases and norms get no weight decay.

    Raises:
        TrainingError: every parameter is frozen.
        UsageError: timm knows no such optimizer, or it does not take these settings.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError("every parameter is frozen (requires_grad=False): nothing to train")
    # timm's `sgd` is Nesterov's, which needs momentum
    plain = config.optimizer == "sgd" and config.momentum == 0
    try:
        made: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt="momentum" if plain else config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=True,
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise UsageError(
            f"optimizer {config.optimizer!r} can't be made: {error}; sgd and adamw are usual"
        ) from None
    return made


def layout_of(model: nn.Module, config: TrainingConfig) -> torch.memory_format:
    """Return the layout of image batches, and put the model into it."""
    if not config.channels_last:
        return torch.contiguous_format
    if device_of(model).type == "cpu":
        raise UsageError(
            "channels_last is for GPUs: on a CPU torch's convolutions can corrupt memory in it"
        )
    model.to(memory_format=torch.channels_last)
    return torch.channels_last


def native_bfloat16(device: torch.device) -> bool:
    """Return whether a device is known to compute in bfloat16.

    GPUs say so, and x86 processors; those that do not emulate it, many times slower.
    """
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def uses_bfloat16(config: TrainingConfig, device: torch.device) -> bool:
    """Return whether forward passes run in bfloat16: as asked, else on GPUs that have it."""
    if config.amp is None:
        return device.type == "cuda" and native_bfloat16(device)
    return config.amp


def attacks_in_bfloat16(config: TrainingConfig, device: torch.device) -> bool:
    """Return whether training attacks run in bfloat16: as asked, else where it is native."""
    return native_bfloat16(device) if config.attack_amp is None else config.attack_amp


def folded_copy(model: nn.Module, config: TrainingConfig, images: Tensor) -> Folded | None:
    """Return the copy that attacks go through, None where they go through the model itself."""
    if not config.fold_batchnorm or config.attack_batchnorm != "eval":
        return None
    return Folded.of(model, images.to(device_of(model)))


def batches_of(images: int, batch_size: int, processes: int) -> int:
    """Return how many batches an epoch has: a last one too small for batch norms is left out.

    Raises:
        UsageError: no batch has the two images that each process needs.
    """
    if batch_size < 2 * processes:
        raise UsageError(
            f"batch size {batch_size} must be at least 2 for each of {processes} processes"
        )
    batches = images // batch_size + (images % batch_size >= 2 * processes)
    if batches == 0:
        raise UsageError(
            f"{images} training images are too few for {processes} processes: each needs two"
        )
    return batches
