"""Training methods that are ideas: what a teacher says of what, and of which images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.finetune import Attack
from robust_prune.finetune.methods.rslad import soft_labels

CONFIDENT = 0.5  # share of augmented images kept, the teacher's surest
ZOOM = 0.6, 1.0  # of an image's side that an augmented one shows
LIGHT = 0.4  # how far brightness and contrast move, at most


def teacher_both(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, teacher: nn.Module
) -> Tensor:
    """Return half of cross-entropy on PGD images and half of what the teacher says of both.

    The latter is the mean of KL(T(x') || S(x')) and KL(T(x) || S(x)): the teacher is seen on the
    attacked images too, so that it teaches what a robust model does not know.
    """
    adversarial = attack(model, images, labels)
    attacked, clean = model(adversarial), model(images)
    taught = [
        F.kl_div(F.log_softmax(logits, 1), soft_labels(teacher, seen), reduction="batchmean")
        for logits, seen in ((attacked, adversarial), (clean, images))
    ]
    return 0.5 * attack.cross_entropy(attacked, labels) + 0.25 * (taught[0] + taught[1])


def own_augmentations(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, teacher: nn.Module
) -> Tensor:
    """Return PGD-AT's loss, a part of the batch being zoomed and relit images.

    Of the second half of the batch, augmented, those of which the teacher (the dense model) is
    surest take the place of the originals, with the label that it gives them.
    """
    half = len(images) // 2
    strange = augmented(images[half:])
    told = soft_labels(teacher, strange)
    sure = told.amax(1).topk(int(CONFIDENT * len(strange))).indices
    mixed, targets = images.clone(), labels.clone()
    mixed[half + sure] = strange[sure]
    targets[half + sure] = told.argmax(1)[sure]
    return attack.cross_entropy(model(attack(model, mixed, targets)), targets)


def augmented(images: Tensor) -> Tensor:
    """Return [N, C, H, W] in [0, 1]: each a part of its image at full size, lit otherwise."""
    n = len(images)
    side = torch.empty(n).uniform_(*ZOOM)
    grids = torch.zeros(n, 2, 3)
    grids[:, 0, 0] = grids[:, 1, 1] = side
    grids[:, :, 2] = (2 * torch.rand(n, 2) - 1) * (1 - side)[:, None]
    grid = F.affine_grid(grids.to(images), list(images.shape), align_corners=False)
    parts = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    brighter, sharper = 1 + LIGHT * (2 * torch.rand(2, n, 1, 1, 1, device=images.device) - 1)
    mean = parts.mean((1, 2, 3), keepdim=True)
    lit: Tensor = ((parts - mean) * sharper + mean * brighter).clamp(0, 1)
    return lit
