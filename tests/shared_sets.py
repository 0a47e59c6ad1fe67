"""Encoders and a step that tests of sets shared over ranks and over actors have in common."""

from __future__ import annotations

import torch
from torch import nn

from distset import UMBC, DeepSets, Exact, Features, Sampled, encode_set

DIM = 5
GRADS = {"exact": Exact(), "sampled": Sampled(1), "three": Sampled(3), "weighted": Sampled(2, "weighted")}


def encoders() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.Dropout(0.3))
    zoo = {
        "umbc": UMBC(DIM, 3, random_slots=True, residual=True),
        "dropout-umbc": Features(mlp, UMBC(6, 2)),
        "deepsets": DeepSets(nn.Sequential(nn.Linear(DIM, 6), nn.Tanh()), "mean"),
        "max": DeepSets(nn.Sequential(nn.Linear(DIM, 6), nn.Tanh()), "max"),
    }
    return {name: encoder.double() for name, encoder in zoo.items()}


def step(encoder: nn.Module, set_, grad) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The value and the gradient of every parameter."""
    encoder.zero_grad()
    z = encode_set(encoder, set_, grad=grad, seed=3)
    (z.sin() * torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype).view_as(z)).sum().backward()
    return z.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in encoder.parameters()]
