"""How much planning measures: by images of the model's own kind, or by stand-ins for them."""

from __future__ import annotations

from dataclasses import dataclass

from robust_prune.allocation import CAPS, STEPS
from robust_prune.criteria import FEWEST_IMAGES, IMAGE_PASSES
from robust_prune.pipeline.settings import CALIBRATION_IMAGES

CPU_MACS = 10**13  # some minutes of a few cores
SEARCH_IMAGES = 16, 256  # at least, at most

# Stand-ins tell less than data does, however many: some ten seconds of one core for each of three
# parts (attack, curves, candidates). Beside its multiply-adds a pass costs time for each pixel.
STAND_IN_MACS = 3 * 10**11
MACS_OF_A_PIXEL = 2 * 10**4
STAND_IN_STEPS = 3
STAND_IN_IMAGES = 16, 256
STAND_IN_SEARCH = 8, 128
# Free curves may cut what stand-ins have no use for, and data has: a network for digits lost its
# last layer that way.
STAND_IN_CAPS = CAPS[:2]
BATCH_PIXELS = 1 << 18  # larger batches are no faster


@dataclass(frozen=True)
class Effort:
    """What planning may spend.

    Attributes:
        images: to attack, and to measure on.
        attack_steps: of PGD.
        step_share: length of a step, in shares of eps.
        clean: more images, not attacked, that layers are fitted on.
        passes: images times forward passes that curves, and the search, may each take.
        fewest: images that a point of a curve takes at least.
        search_images: at least and at most, that candidates are attacked on.
        search_steps: of PGD, on candidates.
        caps: how free the curves are, by candidate; see `candidate_widths`.
        batch_size: images at a time, at most.
        stand_in: whether attacks take gradients from a quicker copy of the model, which a few
            images do not pay for.
        cut_short: whether `images` are fewer than the default, for the sake of time.
    """

    images: int
    attack_steps: int
    step_share: float
    clean: int
    passes: int
    fewest: int
    search_images: tuple[int, int]
    search_steps: int
    caps: tuple[float, ...]
    batch_size: int
    stand_in: bool
    cut_short: bool


def effort_with_data(asked: int | None, macs: int, cpu: bool, large: bool = False) -> Effort:
    """Return what images of the model's own kind are worth.

    Args:
        asked: images to measure on; None for as many as end in minutes on a CPU.
        macs: multiply-adds of the model for one image.
        cpu: whether the model runs on one.
        large: whether copies of the model are too much for memory.
    """
    images = asked or CALIBRATION_IMAGES
    if asked is None and cpu:
        # PGD-10 and one more pass, forward and backward
        images = max(64, min(CALIBRATION_IMAGES, CPU_MACS // (3 * 11 * max(macs, 1))))
    return Effort(
        images=images,
        attack_steps=10,
        step_share=1 / 4,
        clean=images,
        passes=min(IMAGE_PASSES, CPU_MACS // max(macs, 1)) if cpu else IMAGE_PASSES,
        fewest=FEWEST_IMAGES,
        search_images=SEARCH_IMAGES,
        search_steps=STEPS,
        caps=CAPS,
        batch_size=64,
        stand_in=not large,
        cut_short=asked is None and images < CALIBRATION_IMAGES,
    )


def effort_with_stand_ins(asked: int | None, macs: int, pixels: int) -> Effort:
    """Return what stand-ins are worth; the same on every machine.

    Args:
        asked: images to measure on; None for as many as end in seconds.
        macs: multiply-adds of the model for one image.
        pixels: of an image.
    """
    work = macs + MACS_OF_A_PIXEL * pixels
    least, most = STAND_IN_IMAGES
    attacked = STAND_IN_MACS // (work * 3 * (STAND_IN_STEPS + 1))
    images = asked or max(least, min(most, attacked))
    return Effort(
        images=images,
        attack_steps=STAND_IN_STEPS,
        step_share=1 / 2,
        clean=images,
        passes=min(IMAGE_PASSES, STAND_IN_MACS // work),
        fewest=4,
        search_images=STAND_IN_SEARCH,
        search_steps=STAND_IN_STEPS,
        caps=STAND_IN_CAPS,
        batch_size=max(4, min(64, BATCH_PIXELS // pixels)),
        stand_in=False,
        cut_short=False,
    )
