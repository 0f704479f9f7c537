"""Fine-tunes the head of a network whose backbone is frozen."""

import torch
from digits import digits
from torch import nn
from torch.utils.data import DataLoader

import batchnorm

torch.manual_seed(0)
backbone = nn.Sequential(
    nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
)
head = nn.Linear(256, 10)
model = nn.Sequential(backbone, head)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in DataLoader(digits(4096, seed=1), batch_size=64):  # pretraining
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()

for parameter in backbone.parameters():
    parameter.requires_grad = False
batchnorm.freeze(backbone)
before = backbone[1].running_mean.clone()

dark = digits(1024, seed=2).tensors  # the new data
optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
for epoch in range(3):
    model.train()
    for x, y in zip(dark[0].split(64), dark[1].split(64), strict=True):
        loss = nn.functional.cross_entropy(model(x * 0.3 - 0.5), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
moved = (backbone[1].running_mean - before).abs().max().item()
print(f"the frozen backbone's statistics moved by {moved:.3f}")
