"""Figure 3: what the encoding of a set owes to the partition it came in.

    python -m distset.problems.partition_figure [--out docs/figures]

Every model of amortized clustering, with its initial weights, is shown one set of 1,024 points in 100 random partitions, in
float64; printed and drawn is the variance of what it says of the set, averaged over the entries.

References:
    Willette et al. 2023, figure 3. https://arxiv.org/abs/2208.12401
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from distset.data.synthetic_mixtures import MixtureSets
from distset.encoders import ChunkEncoder
from distset.report.set_figures import plot_variances
from distset.seeds import seeded
from distset.tasks import clustering_models as models
from distset.tasks.set_models import SetModel, partition_variance

__all__ = ["variances"]

MODELS: dict[str, Callable[..., tuple[ChunkEncoder, nn.Module]]] = {
    "UMBC + Set Transformer": models.umbc_set_transformer,
    "UMBC + FSPool": models.umbc_fspool,
    "UMBC + DiffEM": models.umbc_diffem,
    "SSE": models.sse,
    "SSE, hierarchical": models.hierarchical_sse,
    "DeepSets": models.deepsets,
    "Set Transformer": models.set_transformer,
    "FSPool": models.fspool,
    "DiffEM": models.diffem,
}


def variances(*, points: int = 1024, partitions: int = 100, seed: int = 0) -> dict[str, float]:
    """The variance over partitions, by model."""
    elements = torch.from_numpy(MixtureSets(1, size=points, seed=seed).draw(0).points).double()
    found = {}
    for name, maker in MODELS.items():
        with seeded(seed, torch.device("cpu")):
            encoder, head = maker(2, 4)
        model = SetModel(encoder, head).double().eval()
        found[name] = partition_variance(functools.partial(model, seed=0), elements, partitions=partitions, seed=seed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    found = variances()
    for name, variance in found.items():
        print(f"{name:26} {variance:.1e}")
    plot_variances(found, args.out / "partition_variance.png")


if __name__ == "__main__":
    main()
