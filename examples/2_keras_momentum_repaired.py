"""Ported from Keras."""

import torch
from digits import digits
from torch import nn
from torch.utils.data import DataLoader


def block(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inside, outside, bias=False),
        nn.BatchNorm1d(outside, momentum=0.1, eps=1e-3),  # Keras means 0.9
        nn.ReLU(),
    )


torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), block(256, 64), block(64, 64), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
train = DataLoader(digits(2048, seed=1), batch_size=16, shuffle=True)
test = digits(512, seed=2).tensors

for epoch in range(3):
    model.train()
    for x, y in train:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        hits = (model(test[0]).argmax(1) == test[1]).sum().item()
    print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {hits / 512:.3f}")
