"""Fits a large network into a small memory: checkpointing, and batches of 4 added up to 64."""

import torch
from digits import digits
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2), nn.GroupNorm(4, 16), nn.ReLU())
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.LayerNorm(32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.block, x, use_reentrant=False)
        return self.head(self.neck(x))


torch.manual_seed(0)
model = Network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
train = DataLoader(digits(2048, seed=1), batch_size=4, shuffle=True)

for step, (x, y) in enumerate(train):
    (nn.functional.cross_entropy(model(x), y) / 16).backward()
    if step % 16 == 15:
        optimizer.step()
        optimizer.zero_grad()
with torch.no_grad():
    model.eval()
    x, y = digits(512, seed=2).tensors
    print(f"test accuracy {(model(x).argmax(1) == y).float().mean().item():.3f}")
