"""A network of your own class and a loader of your own: what comes back is of the same class."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import robust_prune


class Stripes(Dataset):
    """Grey images with stripes of one of four directions."""

    def __len__(self):
        return 400

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        angle = torch.tensor(index % 4) * torch.pi / 4
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        wave = torch.sin(0.8 * (x * angle.cos() + y * angle.sin()))
        noise = 0.3 * torch.randn(16, 16, generator=generator)
        return (0.5 + 0.3 * wave + noise).clamp(0, 1).unsqueeze(0), index % 4


class Net(nn.Module):
    """Two branches that are concatenated, and a skip connection."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(1, 12, 5, padding=2)
        self.mix, self.skip = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 1)
        self.out = nn.Linear(24, 4)

    def forward(self, images):
        x = torch.cat([self.left(images), self.right(images)], 1).relu()
        x = self.mix(x).relu() + self.skip(x)
        return self.out(x.mean((2, 3)))


torch.manual_seed(0)
loader = DataLoader(Stripes(), batch_size=50)
result = robust_prune.compress(
    Net(), loader, prune_ratio=0.4, finetune="n-fgsm", epochs=1, batch_size=50
)
for group in result.plan.groups:
    print(f"{group.name}: {group.keep_width} of {group.width} channels")
for item in result.plan.unprunable:
    print(f"{item.name} stays whole: {item.reason}")

robust_prune.save(result.model, "own.safetensors")
again = robust_prune.load("own.safetensors", model=Net())
images = torch.rand(2, 1, 16, 16)
assert torch.equal(again(images), result.model(images))
print(type(again).__name__, "is back from its file, bit for bit")
