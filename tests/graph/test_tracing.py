"""The tracer: which channels go together, found soundly, and pruned as masking says."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm import layers
from timm.layers import grn
from torch import Tensor, nn

from robust_prune.errors import ModelError
from robust_prune.graph import (
    Atoms,
    ModelGraph,
    adapter,
    check_pruned,
    compress,
    count_cost,
    mask_,
    masking_error,
    prune_,
)
from robust_prune.graph.tracing.adapters import _BY_CLASS
from robust_prune.graph.tracing.atoms import alike, places
from robust_prune.models import build_model, resolve_spec
from robust_prune.modules import ImageModel, fields_of, set_fields_
from tests.graph.test_graph import random_plan, random_widths_plan

SMALL = {
    "mobilevit_xxs": ({}, 64),
    "mobilevitv2_050": ({}, 64),
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 2}, 64),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 2, "depths": (1, 1, 2, 1)},
        64,
    ),
    "convnext_atto": ({"depths": (1, 1, 2, 1)}, 64),
    "convnextv2_atto": ({"depths": (1, 1, 2, 1)}, 64),
    "densenet121": ({"block_config": (2, 3, 4, 2)}, 64),
    "nf_resnet26": ({}, 64),
    "resnetv2_18": ({}, 64),
    "pvt_v2_b0": ({"depths": (1, 1, 1, 1)}, 64),
    "mixer_s32_224": ({"img_size": 64}, 64),
    "res2net50_14w_8s": ({"layers": (1, 1, 1, 1)}, 64),
    "efficientnet_b0": ({}, 64),
    "fastvit_t8": ({}, 64),
    "eva02_tiny_patch14_224": ({"img_size": 56, "depth": 2}, 56),
    "mambaout_femto": ({}, 64),
    # the bias of keys is in no file
    "beit_base_patch16_224": ({"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 3}, 32),
    "swinv2_tiny_window8_256": (
        {
            "img_size": 32,
            "depths": (1, 1),
            "embed_dim": 12,
            "num_heads": (3, 6),
            "window_size": 4,
        },
        32,
    ),
    "resnetblur18": ({}, 64),  # fixed kernels that are in no file
    "torchvision/shufflenet_v2_x0_5": ({}, 64),
    "torchvision/googlenet": ({}, 64),
}


def build(arch: str, seed: int = 0) -> tuple[ImageModel, tuple[int, int, int]]:
    kwargs, side = SMALL[arch]
    torch.manual_seed(seed)
    spec = resolve_spec(arch, {"num_classes": 10, **kwargs})
    model = build_model(spec).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 2, generator=generator)
        elif tensor.ndim == 1 and isinstance(tensor, nn.Parameter):
            tensor.data.normal_(0.5, 0.2, generator=generator)  # no gain starts at 0 or 1
    return model, (3, side, side)


@pytest.mark.parametrize("arch", list(SMALL))
def test_families_prune_as_masking_does_and_reload_bit_equal(arch: str, tmp_path: Path) -> None:
    import robust_prune as rp

    model, size = build(arch)
    graph = ModelGraph(model, size)
    plan = random_plan(graph, 0.5)
    assert plan.reached == pytest.approx(0.5, abs=0.01)
    other = copy.deepcopy(model)
    graph.apply_(plan)
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(1))
    assert masking_error(other, model, plan, images) < 1e-9
    counted = count_cost(model, size)
    assert (counted.macs, counted.params) == (plan.pruned.macs, plan.pruned.params)
    again = rp.load(rp.save(model, tmp_path / "pruned.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    # a plan made on one copy applies to another, bit for bit
    pruned = prune_(other, type(plan).from_json(plan.to_json()))
    for key, value in pruned.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    model.train()(images).sum().backward()


MODELS = {arch: build(arch) for arch in ("mobilevit_xxs", "mobilevitv2_050", "pvt_v2_b0")}
GRAPHS = {arch: ModelGraph(model, size) for arch, (model, size) in MODELS.items()}


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.data())
def test_random_plans_prune_as_masking_does_at_exactly_the_predicted_cost(
    arch: str, data: st.DataObject
) -> None:
    model, size = MODELS[arch]
    plan = random_widths_plan(GRAPHS[arch], data)
    pruned = prune_(copy.deepcopy(model), plan)
    counted = count_cost(pruned, size)
    assert (counted.macs, counted.params) == (plan.pruned.macs, plan.pruned.params)
    assert masking_error(model, pruned, plan, torch.rand(1, *size)) < 1e-9


@pytest.mark.parametrize("arch", ["mobilevit_xxs", "mobilevit_xs", "mobilevitv2_050"])
@pytest.mark.parametrize("size", [32, 64, 224])
def test_mobilevit_is_prunable_whole(arch: str, size: int) -> None:
    spec = resolve_spec(arch, {"num_classes": 10}, cifar_stem=size == 32)
    model = build_model(spec).eval()
    graph = ModelGraph(model, (3, size, size))
    assert [item.name for item in graph.unprunable] == ["head.fc"]
    assert graph.reachable > 0.999  # all but the classifier's bias
    if size == 32:
        shapes = []
        model.net.stages.register_forward_hook(lambda m, i, o: shapes.append(o.shape[-1]))
        model(torch.rand(1, 3, 32, 32))
        assert shapes == [4]


def test_the_groups_of_a_mobilevit_block() -> None:
    graph = ModelGraph(timm.create_model("mobilevit_xxs").eval(), (3, 64, 64))
    by_name = {group.name: group for group in graph.groups}
    block = by_name["stages.2.1.conv_1x1"]  # the transformer's width, one group
    assert block.width == 64
    inner = {
        f"stages.2.1.transformer.{i}.{part}" for i in (0, 1) for part in ("attn.proj", "mlp.fc2")
    }
    assert inner < set(block.members)
    assert {"stages.2.1.transformer.0.attn.qkv", "stages.2.1.conv_proj.conv"} < set(block.readers)
    heads = by_name["stages.2.1.transformer.0.attn.qkv"]  # the same dims of every head, in q, k, v
    assert (heads.width, heads.units, heads.blocks) == (192, 16, 12)
    hidden = by_name["stages.2.1.transformer.0.mlp.fc1"]
    assert hidden.readers == ("stages.2.1.transformer.0.mlp.fc2",)
    # the skip that is concatenated reaches the fusion's first columns, the projection's the rest
    fusion = "stages.2.1.conv_fusion.conv"
    skip, projected = (
        slot
        for name in ("stages.2.0.conv3_1x1.conv", "stages.2.1.conv_proj.conv")
        for slot in graph.slots(name)
        if slot.layer == fusion and slot.role == "in"
    )
    assert skip.indices.tolist() == list(range(48))
    assert projected.indices.tolist() == list(range(48, 96))


def test_attention_keeps_the_dense_scale_whichever_kernel_runs() -> None:
    model, size = build("vit_tiny_patch16_224")
    graph = ModelGraph(model, size)
    plan = random_plan(graph, 0.5)
    dense = copy.deepcopy(model)
    graph.apply_(plan)
    attention = model.net.blocks[0].attn
    assert attention.head_dim == plan.group("blocks.0.attn.qkv").keep_width // 9
    assert attention.scale == pytest.approx(attention.head_dim**-0.5)
    images = torch.rand(1, *size)
    for fused in (True, False):
        for block in (*model.net.blocks, *dense.net.blocks):
            block.attn.fused_attn = fused
        assert masking_error(dense, model, plan, images) < 1e-9


def test_widths_that_the_code_couples_without_saying_are_tied() -> None:
    model, size = build("pvt_v2_b0")
    graph = ModelGraph(model, size)
    assert graph.ties
    assert [item.name for item in graph.unprunable] == ["head"]
    plan = random_plan(graph, 0.5)
    assert plan.ties == graph.ties
    assert type(plan).from_json(plan.to_json()).ties == graph.ties


class Odd(nn.Module):
    """Does `odd` to 12 channels between two convolutions."""

    def __init__(self, odd: object) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3)
        self.out = nn.Linear(8, 4)
        self.odd = odd

    def forward(self, images: Tensor) -> Tensor:
        x = self.odd(self.first(images))  # type: ignore[operator]
        return self.out(self.second(x).mean((2, 3)))


def _written(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    return x


def _shifted(x: Tensor) -> Tensor:
    out, part = x.clone(), x.shape[1] // 4
    out[:, :part, :, 1:] = x[:, :part, :, :-1]
    return out


@pytest.mark.parametrize(
    ("odd", "prunable"),
    [
        (lambda x: x, True),
        (lambda x: x.flip(1), True),
        (lambda x: torch.cat([x[:, 6:], x[:, :6]], 1), False),  # a number in the code
        (lambda x: torch.cat([x.chunk(2, 1)[1], x.chunk(2, 1)[0]], 1), True),
        (lambda x: x * x.mean((2, 3), keepdim=True), True),
        (lambda x: x * x.mean(1, keepdim=True), False),
        (lambda x: x.softmax(1), False),
        (lambda x: x.cumsum(1), False),
        (lambda x: x.sort(1).values, False),
        (lambda x: x.roll(1, 1), False),
        (lambda x: x.roll(1, 2), True),
        (lambda x: x[:, torch.arange(11, -1, -1)], False),
        (lambda x: x[:, :, [0, 1, 2]], True),
        (lambda x: x * torch.linspace(0, 1, 12).view(1, 12, 1, 1), False),
        (lambda x: x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2), False),
        (lambda x: F.channel_shuffle(x, 3), True),
        (lambda x: x.view(x.shape[0], 3, -1, *x.shape[2:]).sum(1).repeat(1, 3, 1, 1), True),
        (lambda x: torch.fft.fft2(x, dim=(1, 2)).real, False),
        (lambda x: torch.einsum("bchw,bdhw->bchw", x, x), True),
        (lambda x: F.local_response_norm(x, 3), False),
        (lambda x: F.normalize(x, dim=1), True),
        (lambda x: x.pow(2).clone().clamp_(max=3.0), True),
        (lambda x: x * torch.sigmoid(x[:, :1]), False),
        (lambda x: torch.cat([x[:, :6].relu(), x[:, 6:].sigmoid()], 1), False),
        (lambda x: torch.cat([p.relu() for p in x.split([6, 6], 1)], 1), False),
        (lambda x: torch.cat([p.relu() for p in x.split([5, 7], 1)], 1), False),
        (lambda x: torch.cat([x.narrow(1, 0, 5), x.narrow(1, 5, 7)], 1), False),
        (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), True),
        (lambda x: x.flatten(2).softmax(-1).view_as(x), True),
        (lambda x: x + torch.where(x > 100)[0].sum() * 0, False),
        (_written, False),
        (_shifted, False),
    ],
)
def test_what_operations_do_to_channels(odd: object, prunable: bool) -> None:
    torch.manual_seed(0)
    model = Odd(odd).eval()
    graph = ModelGraph(model, (3, 9, 9))
    assert ("first" in {group.name for group in graph.groups}) == prunable
    if not prunable:
        assert next(u.reason for u in graph.unprunable if u.name == "first")
    for seed in range(6):
        plan = random_plan(graph, 0.1 + 0.05 * seed, seed=seed)
        pruned = prune_(copy.deepcopy(model), plan)
        assert masking_error(model, pruned, plan, torch.rand(2, 3, 9, 9)) < 1e-9


class NonLocal(nn.Module):
    """Takes its input's width for its own, which no operation says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x).relu().flatten(2).softmax(-1).view(x.shape)


class Nested(nn.Module):
    """A norm inside a module that counts a width equal to one that the norm may get."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(12), nn.Linear(12, 4), nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        z = self.down(self.norm(y)).view(len(x), -1, 1, self.down.out_features).flatten(2)
        return (y + self.up(z)).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


class Folded(nn.Module):
    """A linear layer over the tokens of every channel, channels folded into the batch; twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(49, 49)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x.reshape(-1, 49)).view(x.shape)
        return self.mix(y.flatten(2)).view(x.shape)


class Computed(nn.Module):
    """A weight that is the product of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(12, 12, 3, 3))
        self.gain = nn.Parameter(torch.rand(12, 1, 1, 1))
        self.plain = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel * self.gain, padding=1)


class Bare(nn.Module):
    """Products with parameters that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12, 10))
        self.back = nn.Parameter(torch.rand(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x.permute(0, 2, 3, 1) @ self.weight).relu()
        return F.linear(hidden, self.back).permute(0, 3, 1, 2)


class Dot(nn.Module):
    """An attention by plain products: queries and keys lose the same channels, values their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(12, 6), nn.Linear(12, 6)
        self.value, self.out = nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        weights = (self.query(y) @ self.key(y).transpose(1, 2)).softmax(-1)
        return self.out(weights @ self.value(y)).transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (lambda: NonLocal(12), {"first", "second"}),
        (Nested, {"first", "odd.down", "second"}),
        (Dot, {"first", "odd.query", "odd.value", "odd.out", "second"}),
        (Folded, {"first", "second"}),
        (Computed, {"second"}),
        (Bare, {"first", "odd", "odd.back", "second"}),
    ],
)
def test_modules_with_ways_of_their_own(make: object, groups: set[str]) -> None:
    torch.manual_seed(0)
    model = Odd(make()).eval()  # type: ignore[operator]
    graph = ModelGraph(model, (3, 9, 9))
    assert {g.name for g in graph.groups} == groups
    for seed in range(12):
        plan = random_plan(graph, 0.05 + 0.009 * seed, seed=seed)
        pruned = prune_(copy.deepcopy(model), plan)  # checks the multiply-adds, too
        images = torch.rand(2, 3, 9, 9)
        assert masking_error(model, pruned, plan, images) < 1e-9
        masked = copy.deepcopy(mask_(copy.deepcopy(model), plan)).double()
        expected = pruned.double()(images.double())
        torch.testing.assert_close(masked(images.double()), expected)


@pytest.mark.parametrize(
    ("make", "prunable"),
    [
        (lambda: layers.RmsNorm2d(12), True),
        (lambda: layers.RmsNormAct2d(12), True),
        (lambda: layers.SimpleNorm2d(12), True),
        (lambda: layers.LayerNorm2d(12), True),
        (lambda: layers.GroupNormAct(12, 4), True),
        (lambda: grn.GlobalResponseNorm(12, channels_last=False), True),
        (lambda: layers.StdConv2d(12, 12, 3), True),
        (lambda: layers.StdConv2dSame(12, 12, 3, stride=2), True),
        (lambda: layers.ScaledStdConv2d(12, 12, 3), True),
        (lambda: layers.ScaledStdConv2dSame(12, 12, 3, stride=2), True),
        (lambda: layers.SqueezeExcite(12), True),
        (lambda: layers.EcaModule(12), False),  # its kernel slides over the channels
        (lambda: layers.BlurPool2d(12), True),
        (lambda: layers.BlurPool2d(), False),  # its one row is spread over the channels
        (lambda: nn.PReLU(12), True),
        (lambda: nn.InstanceNorm2d(12, affine=True), True),
        (lambda: nn.InstanceNorm2d(12), True),
        (lambda: nn.ConvTranspose2d(12, 12, 2, stride=2), True),
        (lambda: nn.Conv2d(12, 24, 3, groups=12), True),
        (lambda: nn.Conv2d(12, 12, 3, groups=3), True),
    ],
)
def test_layers_of_timm_and_torch(make: object, prunable: bool) -> None:
    torch.manual_seed(0)
    layer = make()  # type: ignore[operator]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    model = Odd(layer)
    if isinstance(layer, nn.Conv2d) and layer.out_channels == 24:
        model.second = nn.Conv2d(24, 8, 3)
    model.eval()
    graph = ModelGraph(model, (3, 9, 9))
    assert ("first" in {g.name for g in graph.groups}) == prunable
    for seed in range(4):
        plan = random_plan(graph, 0.04 + 0.03 * seed, "channels", seed=seed)
        pruned = prune_(copy.deepcopy(model), plan)
        assert masking_error(model, pruned, plan, torch.rand(2, 3, 9, 9)) < 1e-9


def test_grey_images_have_a_prunable_stem() -> None:
    model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3), nn.Flatten())
    assert ModelGraph(model, (1, 8, 8)).groups[0].name == "0"


@pytest.mark.parametrize(
    ("arch", "kwargs", "side"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}, 64),
        ("mobilevit_xxs", {}, 64),
        ("mixer_s32_224", {"img_size": 64}, 64),
        ("torchvision/vit_b_16", {"image_size": 64}, 64),
    ],
)
def test_multiply_adds_are_those_of_every_call(arch: str, kwargs: dict, side: int) -> None:
    net = build_model(resolve_spec(arch, {"num_classes": 5, **kwargs})).net.eval()
    expected = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal expected
        if not isinstance(module, (nn.Conv2d, nn.Linear)):  # q k^T and its product with v
            batch, tokens, width = inputs[0].shape
            expected += 2 * batch * tokens**2 * width
        if isinstance(module, nn.MultiheadAttention):
            expected += tokens * (module.in_proj_weight.numel() + module.out_proj.weight.numel())
        elif isinstance(module, nn.Conv2d):
            expected += module.weight.numel() * out[:, 0].numel()
        elif isinstance(module, nn.Linear):
            expected += module.weight.numel() * out[..., 0].numel()

    for module in net.modules():
        layer = isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention))
        if layer or type(module).__name__ in ("Attention", "WindowAttention"):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.rand(1, 3, side, side))
    by_hand = expected
    assert count_cost(net, (3, side, side)).macs == by_hand
    assert ModelGraph(net, (3, side, side), probe=False).cost().macs == by_hand


def test_widths_of_a_transformer_are_not_those_of_its_tokens() -> None:
    model, size = build("vit_tiny_patch16_224")
    graph = ModelGraph(model, size)
    plan = random_plan(graph, 0.5)
    graph.apply_(plan)
    assert model.net.num_features in (192, plan.group("patch_embed.proj").keep_width)


class Silent(torch.autograd.Function):
    """An operation that the tracer has no rule for."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.flip(1) + 1


class Own(nn.Module):
    """A layer whose channels only its author can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(self.gain).values.view(1, -1, 1, 1) * 0 + Silent.apply(x).flip(1) * (
            self.gain.view(1, -1, 1, 1)
        )


def test_an_adapter_of_the_user_makes_a_class_prunable() -> None:
    torch.manual_seed(0)
    model = Odd(Own()).eval()
    assert "first" not in {g.name for g in ModelGraph(model, (3, 9, 9)).groups}

    @adapter(Own)
    def trace(module: Own, x: Tensor) -> Tensor:
        return x * module.gain.view(1, -1, 1, 1)

    try:
        graph = ModelGraph(model, (3, 9, 9))
        first = next(g for g in graph.groups if g.name == "first")
        assert set(first.members) == {"first", "odd"}
        plan = random_plan(graph, 0.5)
        pruned = prune_(copy.deepcopy(model), plan)
        assert pruned.odd.gain.shape == (plan.group("first").keep_width,)
        assert masking_error(model, pruned, plan, torch.rand(2, 3, 9, 9)) < 1e-9
    finally:
        del _BY_CLASS[Own]


class Kernel(torch.autograd.Function):
    """An attention that no tracer looks into."""

    @staticmethod
    def forward(ctx: object, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(scale).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)


class OwnAttention(nn.Module):
    """Heads, a width and a scale of its own, behind a kernel."""

    def __init__(self, dim: int = 24, heads: int = 2, head_dim: int = 10) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.query = nn.Linear(dim, heads * head_dim)
        self.key, self.value = (nn.Linear(dim, heads * head_dim) for _ in range(2))
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (layer(x).view(shape) for layer in (self.query, self.key, self.value))
        return self.out(Kernel.apply(q, k, v, self.scale).flatten(2))


class Tokens(nn.Module):
    """Patches, one attention around a skip, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 24, 4, 4), nn.LayerNorm(24)
        self.attention, self.classifier = OwnAttention(), nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm(x))
        return self.classifier(x.mean(1))


def test_an_adapter_of_an_attention_names_its_units_its_numbers_and_its_scale(
    tmp_path: Path,
) -> None:
    import robust_prune as rp

    torch.manual_seed(0)
    model = Tokens().eval()
    assert "attention.query" not in {g.name for g in ModelGraph(model, (3, 16, 16)).groups}

    @adapter(OwnAttention)
    def trace(module: OwnAttention, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], module.heads, module.head_dim)
        q, k, v = (
            layer(x).view(shape).transpose(1, 2)
            for layer in (module.query, module.key, module.value)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return module.out(out.transpose(1, 2).flatten(2))

    try:
        graph = ModelGraph(model, (3, 16, 16))
        assert [g.name for g in graph.groups] == ["patches", "attention.query"]
        inner = graph.groups[1]
        assert (inner.width, inner.units, inner.blocks) == (20, 10, 2)
        plan = random_plan(graph, 0.5)
        pruned = prune_(copy.deepcopy(model), plan)
        left = plan.group("attention.query").keep_width // 2
        assert pruned.attention.head_dim == left < 10
        assert pruned.attention.scale == pytest.approx(left**-0.5)
        images = torch.rand(2, 3, 16, 16)
        assert masking_error(model, pruned, plan, images) < 1e-9
        rp.save(pruned, tmp_path / "own.safetensors")
        again = rp.load(tmp_path / "own.safetensors", model=Tokens())
        with torch.no_grad():
            assert torch.equal(again(images), pruned(images))
    finally:
        del _BY_CLASS[OwnAttention]


def test_a_wrong_adapter_costs_groups_but_never_a_wrong_model() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.roll(1, 1)

    @adapter(Shifted)
    def trace(module: Shifted, x: Tensor) -> Tensor:
        return x * 1

    try:
        graph = ModelGraph(Odd(Shifted()).eval(), (3, 9, 9))
        assert [g.name for g in graph.groups] == ["second"]
        reason = next(u.reason for u in graph.unprunable if u.name == "first")
        assert "not the same as masking" in reason
    finally:
        del _BY_CLASS[Shifted]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=25), st.data())
def test_atoms_are_joined_as_sets_are(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    atoms = Atoms()
    atoms.new(19)
    sets = [{i} for i in range(20)]
    cut = data.draw(st.integers(0, len(pairs)))
    for part in (pairs[:cut], pairs[cut:]):
        if part:
            first, second = torch.tensor(part).T
            atoms.join(first, second)
        for a, b in part:
            merged = sets[a] | sets[b]
            for member in merged:
                sets[member] = merged
    found = atoms.find(torch.arange(20)).tolist()
    for i in range(20):
        for j in range(20):
            assert (found[i] == found[j]) == (j in sets[i])
        assert (found[i] == 0) == (0 in sets[i])


def test_labels_shrink_only_where_they_are_constant() -> None:
    label = torch.tensor([[1, 1], [2, 2]])
    assert compress(label, by_value=True).tolist() == [[1], [2]]
    assert compress(label).tolist() == label.tolist()
    assert compress(torch.tensor([[1], [2]]).expand(2, 5)).tolist() == [[1], [2]]


def test_numbers_of_a_strangers_file_set_only_numbers() -> None:
    model, _ = build("vit_tiny_patch16_224")
    set_fields_(model.net, {"blocks.0.attn": {"head_dim": 7}})
    assert fields_of(model.net) == {"blocks.0.attn": {"head_dim": 7}}
    for fields in (
        {"blocks.0.attn": {"forward": 1}},
        {"blocks.0.attn": {"head_dim": "import os"}},
        {"blocks.9.attn": {"head_dim": 7}},
        {"blocks.0.attn": {"no_such": 7}},
        {"blocks.0.attn": {"fused_attn": 0}},
    ):
        with pytest.raises(ModelError, match="no number called"):
            set_fields_(model.net, fields)


def test_code_that_insists_on_float32_is_checked_in_float32() -> None:
    torch.manual_seed(0)
    kernel = torch.rand(12, 1, 3, 3)
    model = Odd(lambda x: x * F.conv2d(x.mean(1, keepdim=True), kernel[:1])[..., :1, :1]).eval()
    graph = ModelGraph(model, (3, 9, 9))
    assert {g.name for g in graph.groups} == {"second"}
    plan = random_plan(graph, 0.2)
    pruned = prune_(copy.deepcopy(model), plan)
    error, dtype = check_pruned(model, pruned, plan, torch.rand(2, 3, 9, 9))
    assert dtype == torch.float32
    assert error < 1e-5


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "mobilevit_xxs"])
@pytest.mark.parametrize("fused", [True, False])
def test_whole_heads_can_go(arch: str, fused: bool, tmp_path: Path) -> None:
    import robust_prune as rp

    model, size = build(arch)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    graph = ModelGraph(model, size, whole_heads=True)
    heads = next(g for g in graph.groups if g.name.endswith("attn.qkv"))
    attention = model.net.get_submodule(heads.name.removesuffix(".qkv"))
    number, width = attention.num_heads, attention.head_dim
    assert (heads.units, heads.width) == (number, 3 * number * width)
    first = [i for i in range(heads.width) if heads.unit(i) == 0]
    assert first == [part * number * width + i for part in range(3) for i in range(width)]
    plan = random_plan(graph, 0.4)
    dense = copy.deepcopy(model)
    graph.apply_(plan)
    assert attention.num_heads == plan.group(heads.name).keep_width // (3 * width)
    assert attention.head_dim == width
    assert masking_error(dense, model, plan, torch.rand(2, *size)) < 1e-9
    again = rp.load(rp.save(model, tmp_path / "heads.safetensors"))
    with torch.no_grad():
        images = torch.rand(2, *size)
        torch.testing.assert_close(again(images), model(images), rtol=1e-4, atol=1e-5)
    replayed = prune_(dense, type(plan).from_json(plan.to_json()))
    assert replayed.net.get_submodule(heads.name).out_features == attention.qkv.out_features


def test_operations_without_a_rule_fix_channels_before_any_trial() -> None:
    model = Odd(lambda x: x + torch.sort(x, 1).values.amax((1, 2, 3), keepdim=True)).eval()
    graph = ModelGraph(model, (3, 9, 9), probe=False)
    assert {g.name for g in graph.groups} == {"second"}
    assert next(u.reason for u in graph.unprunable if u.name == "first") == "meets sort"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=4))
def test_roots_on_the_same_axes_are_alike(axes: list[list[int]]) -> None:
    counts: dict[int, list[tuple[int, int]]] = {}
    for i, roots in enumerate(axes):
        for root in sorted(set(roots) - {0}):
            counts.setdefault(root, []).append((i, roots.count(root)))
    expected: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for root, where in counts.items():
        expected.setdefault(tuple(where), []).append(root)
    found = list(alike([np.array(roots, dtype=np.int64) for roots in axes]))
    assert found == [([i for i, _ in key], roots) for key, roots in expected.items()]


def test_an_atom_is_where_it_was_stored_last() -> None:
    axes = [torch.tensor(atoms) for atoms in ([1, 2, 3], [3, 5], [2, 4, 5])]
    found = places(axes, [True, True, False], [4, 5]).T.tolist()
    assert found == [[-1, -1], [0, 0], [0, 1], [1, 0], [2, 1], [2, 2]]
