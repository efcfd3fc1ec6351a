"""MRS as the importance of a plain torch-pruning script; two steps, each on fresh scores."""

import timm
import torch
import torch_pruning as tp

from robust_prune import MRSImportance, ThreatModel

torch.manual_seed(0)
model = timm.create_model("resnet10t", num_classes=10).eval()  # your robust network
images, labels = torch.rand(32, 3, 32, 32), torch.randint(0, 10, (32,))  # your training images

importance = MRSImportance(model, (images, labels), threat=ThreatModel.linf("8/255"))
pruner = tp.pruner.BasePruner(
    model,
    images[:1],
    importance=importance,
    global_pruning=True,
    pruning_ratio=0.5,
    iterative_steps=2,
    ignored_layers=[model.fc],
)
print(importance)
before, _ = tp.utils.count_ops_and_params(model, images[:1])
for step in (1, 2):
    pruner.step()
    after, params = tp.utils.count_ops_and_params(model, images[:1])
    print(f"step {step}: {after / before:.2f} of the multiply-adds, {params:,.0f} parameters")
    # fine-tune here

model.train()(images).sum().backward()  # an ordinary module, with gradients
