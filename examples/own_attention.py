"""An attention behind a kernel of its own: an adapter makes its heads prunable."""

import torch
import torch.nn.functional as F
from torch import nn

import robust_prune


class Kernel(torch.autograd.Function):
    """Stands for compiled code, which no tracer can look into."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return torch.softmax(q @ k.mT * scale, -1) @ v

    @staticmethod
    def backward(ctx, gradient):
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(*inputs, scale=ctx.scale)
        return *torch.autograd.grad(out, inputs, gradient), None


class Attention(nn.Module):
    def __init__(self, dim=32, heads=4, width=8):
        super().__init__()
        self.heads, self.width, self.scale = heads, width, width**-0.5
        self.qkv, self.out = nn.Linear(dim, 3 * heads * width), nn.Linear(heads * width, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.width)).permute(2, 0, 3, 1, 4)
        return self.out(Kernel.apply(q, k, v, self.scale).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.attention, self.classifier = Attention(), nn.Linear(32, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        return self.classifier((x + self.attention(x)).mean(1))


torch.manual_seed(0)
model = Net()
images, labels = torch.rand(64, 3, 16, 16), torch.randint(0, 10, (64,))
before = robust_prune.compress(model, (images, labels), prune_ratio=0.2).plan
print("without adapter:", [group.name for group in before.groups])


@robust_prune.adapter(Attention)
def trace(module, x):
    """Couples channels as the module does; its values don't matter."""
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, module.width)).permute(2, 0, 3, 1, 4)
    return module.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


result = robust_prune.compress(model, (images, labels), prune_ratio=0.5)
print("with it:", [(group.name, group.keep_width, group.width) for group in result.plan.groups])
attention = result.model.attention
print(f"heads are {attention.width} wide, the scale is {attention.scale:.3f}")
