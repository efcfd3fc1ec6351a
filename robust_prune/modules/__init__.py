"""Modules on images: normalisation inside, checks, contexts, resizing in place."""

from robust_prune.modules.attention import (
    NarrowAttention,
    heads_of,
    joined,
)
from robust_prune.modules.checks import (
    check_float32,
    check_outputs,
    check_transparent,
    checked,
    gives_probabilities,
)
from robust_prune.modules.contexts import (
    batch_statistics,
    evaluating,
    float32_logits,
    random_states,
    requires_grad,
    restore_random_states,
    seeded,
    uncollected,
)
from robust_prune.modules.copying import copied, own_, sharing
from robust_prune.modules.empty_block import (
    TAILS,
    EmptyBlock,
    EmptyForm,
    empty_,
    empty_blocks,
    empty_forms,
    put_in_,
)
from robust_prune.modules.free_memory import images_in_free_memory
from robust_prune.modules.image_model import ImageModel, image_channels, network_of
from robust_prune.modules.layout import (
    channels_last,
    contiguous,
    device_of,
    make_contiguous_,
    plain_layout,
    takes_channels_last,
)
from robust_prune.modules.memory import as_memory_allows, release_memory, telling_of_memory
from robust_prune.modules.outputs import (
    difference,
    outputs_of,
    predict,
    running_statistics,
    tensors_in,
)
from robust_prune.modules.replaying import Replay
from robust_prune.modules.resize import (
    Fields,
    fields_of,
    fit_,
    forget_fields_,
    is_unsaved_constant,
    narrow_,
    set_fields_,
)
from robust_prune.modules.watching import batch_norms, watching

__all__ = [
    "EmptyBlock",
    "forget_fields_",
    "EmptyForm",
    "TAILS",
    "empty_",
    "empty_blocks",
    "empty_forms",
    "put_in_",
    "as_memory_allows",
    "predict",
    "difference",
    "tensors_in",
    "Fields",
    "ImageModel",
    "NarrowAttention",
    "Replay",
    "batch_norms",
    "batch_statistics",
    "channels_last",
    "check_float32",
    "check_outputs",
    "gives_probabilities",
    "check_transparent",
    "checked",
    "contiguous",
    "copied",
    "images_in_free_memory",
    "device_of",
    "evaluating",
    "fields_of",
    "fit_",
    "float32_logits",
    "heads_of",
    "image_channels",
    "is_unsaved_constant",
    "joined",
    "make_contiguous_",
    "narrow_",
    "network_of",
    "outputs_of",
    "own_",
    "plain_layout",
    "random_states",
    "release_memory",
    "requires_grad",
    "restore_random_states",
    "running_statistics",
    "seeded",
    "set_fields_",
    "sharing",
    "takes_channels_last",
    "telling_of_memory",
    "uncollected",
    "watching",
]
