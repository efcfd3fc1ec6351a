"""An adversarial training method of your own, and one that learns from the dense model."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import robust_prune
from robust_prune import ThreatModel
from robust_prune.registry import training_method


def half_and_half(model, images, labels, attack):
    """Half of the batch is attacked, half stays clean."""
    n = len(images) // 2
    attacked = attack(model, images[:n], labels[:n])  # PGD with the run's threat model and steps
    return attack.cross_entropy(model(torch.cat([attacked, images[n:]])), labels)


@training_method("margin-and-teacher")  # now finetune="margin-and-teacher" works, also with +awp
def margin_and_teacher(model, images, labels, attack, teacher):
    """Attack the margin, and learn the dense model's probabilities."""

    def margin(logits):
        right = logits.gather(1, labels[:, None]).squeeze(1)
        wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        return wrong - right  # [N], to be maximised

    attacked = attack(model, images, labels, loss=margin)
    with torch.no_grad():
        soft = teacher(images).softmax(1)
    return F.cross_entropy(model(attacked), soft)


digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
data = images[:1000], torch.tensor(digits.target)[:1000]
torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),
)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(60):  # stands for the training that your model comes from
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()

for method in (half_and_half, "margin-and-teacher+awp"):
    result = robust_prune.compress(
        model,
        data,
        threat=ThreatModel.linf(0.05),
        finetune=method,
        epochs=4,
        attack_steps=3,
        batch_size=50,
    )
    last = result.history.epochs[-1]
    name = result.report["settings"]["finetune"]
    print(f"{name}: clean {last.clean:.2f}, robust {last.robust:.2f}")
