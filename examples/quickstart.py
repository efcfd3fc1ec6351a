"""A small network on handwritten digits: train it adversarially, halve it, judge both."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import robust_prune
from robust_prune import ThreatModel

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)
train, test = (images[:-500], labels[:-500]), (images[-500:], labels[-500:])
threat = ThreatModel.linf(0.1)

torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(8):
    for batch in torch.randperm(len(train[0])).split(64):
        x, y = train[0][batch], train[1][batch]
        noisy = (x + threat.eps * torch.randn_like(x).sign()).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(noisy), y), noisy)
        attacked = (x + threat.eps * gradient.sign()).clamp(0, 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(attacked), y).backward()
        optimizer.step()

result = robust_prune.compress(
    model.eval(),
    train,
    test=test,
    prune_ratio=0.5,
    threat=threat,
    finetune="pgd-at",
    epochs=2,
    attack_steps=3,
    batch_size=64,
    evaluation="pgd",
)
print(f"{100 * result.plan.reached:.1f} % of the multiply-adds are gone")
for name, judged in (("dense", result.dense), ("pruned", result.pruned)):
    for measured in judged.measurements:
        low, high = measured.accuracy.interval
        print(f"{name} {measured.attack}: {measured.accuracy.value:.3f} [{low:.3f}, {high:.3f}]")
robust_prune.save(result.model, "small.safetensors")
