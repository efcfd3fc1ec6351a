"""An attention behind a kernel of its own: an adapter makes its heads prunable."""

import torch
import torch.nn.functional as F
from torch import nn

import robust_prune


class Kernel(torch.autograd.Function):
    """Stands for compiled code on [N, tokens, heads, width], which no tracer can look into."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        weights = torch.einsum("nqhw,nkhw->nhqk", q, k).mul(scale).softmax(-1)
        return torch.einsum("nhqk,nkhw->nqhw", weights, v)

    @staticmethod
    def backward(ctx, gradient):
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            q, k, v = (t.transpose(1, 2) for t in inputs)
            out = F.scaled_dot_product_attention(q, k, v, scale=ctx.scale).transpose(1, 2)
        return *torch.autograd.grad(out, inputs, gradient), None


class Attention(nn.Module):
    def __init__(self, dim=32, heads=4, width=8):
        super().__init__()
        self.heads, self.width, self.scale = heads, width, width**-0.5
        self.query, self.key, self.value = (nn.Linear(dim, heads * width) for _ in range(3))
        self.out = nn.Linear(heads * width, dim)

    def split(self, x):
        """Queries, keys and values [N, tokens, heads, width]."""
        layers = self.query, self.key, self.value
        return (layer(x).unflatten(-1, (self.heads, self.width)) for layer in layers)

    def forward(self, x):
        return self.out(Kernel.apply(*self.split(x), self.scale).flatten(2))


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
    q, k, v = (t.transpose(1, 2) for t in module.split(x))
    out = F.scaled_dot_product_attention(q, k, v)
    return module.out(out.transpose(1, 2).flatten(2))


result = robust_prune.compress(model, (images, labels), prune_ratio=0.5)
print("with it:", [(group.name, group.keep_width, group.width) for group in result.plan.groups])
attention = result.model.attention
print(f"heads are {attention.width} wide, the scale is {attention.scale:.3f}")
