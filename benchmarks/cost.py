"""What an epoch over slides takes on many GPUs, by the cost model of docs/scale.md: every term, and the one that binds.

    python -m benchmarks.cost [--slides 10000] [--patches 100000] [--gpus 64] [--full]

Nothing is measured here: rates are the assumptions printed first, to be replaced by those of one's own machines.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from benchmarks.report import report, table


class Machine(NamedTuple):
    """Rates of one worker, a GPU with its share of the node.

    Attributes:
        flops: sustained operations a second (a third to a half of the data sheet's bfloat16).
        read: bytes a second from storage, all workers at once.
        decode: images a second.
        wire: bytes a second of collectives.
        call: seconds that a step costs whatever its size (launches, collectives, Python).
    """

    flops: float = 150e12
    read: float = 0.6e9
    decode: float = 16 * 2500.0
    wire: float = 20e9
    call: float = 0.02


class Work(NamedTuple):
    """What there is to do for one set.

    Attributes:
        elements: n.
        element_bytes: as stored.
        element_flops: of one pass of an element through the encoder, without a graph.
        replayed: the share of elements that are replayed: 1 for `Exact`, m chunk / n for `Sampled(m)`.
        images: whether elements have to be decoded.
        parameter_bytes: of the trained weights, as they travel.
        state_bytes: of one merged state.
    """

    elements: float
    element_bytes: float
    element_flops: float
    replayed: float
    images: bool
    parameter_bytes: float
    state_bytes: float


def seconds(work: Work, machine: Machine, workers: int = 1) -> dict[str, float]:
    """The terms of a step on one set that ``workers`` share; they overlap, but for the fixed one, so the largest binds.

    Example:
        >>> work = Work(1e5, 2048, 2.4e6, 1.0, False, 3e6, 1.3e5)
        >>> terms = seconds(work, Machine())
        >>> max(terms, key=terms.get), round(terms["read"], 2)
        ('read', 0.68)
    """
    passes = 1 + work.replayed
    each = work.elements / workers
    return {
        "read": each * work.element_bytes * passes / machine.read,
        "decode": each * passes / machine.decode if work.images else 0.0,
        "compute": each * work.element_flops * (1 + 3 * work.replayed) / machine.flops,  # a replay is forward and backward
        "wire": (2 * work.parameter_bytes + 2 * workers * work.state_bytes) / machine.wire,
        "fixed": machine.call,
    }


def cases(patches: int) -> dict[str, Work]:
    """Frozen features of 1,024 halves under a small head; pixels under two backbones, exact and sampled."""
    head = Work(patches, 2048, 2 * (1024 * 512 + 2 * 64 * 512), 1.0, False, 4 * 0.9e6, 4 * 64 * 512)
    small = Work(patches, 20e3, 3.6e9, 1.0, True, 4 * 11.7e6, 4 * 64 * 512)
    large = Work(patches, 20e3, 35e9, 1.0, True, 4 * 86e6, 4 * 64 * 512)
    one = 256 / patches
    return {
        "features, head, Exact": head,
        "features, head, Sampled(1)": head._replace(replayed=one),
        "pixels, ResNet18, Exact": small,
        "pixels, ResNet18, Sampled(1)": small._replace(replayed=one),
        "pixels, ViT-B/16, Exact": large,
        "pixels, ViT-B/16, Sampled(1)": large._replace(replayed=one),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--patches", type=int, default=100_000, help="a slide")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--full", action="store_true", help="as every benchmark has it; there is nothing longer here")
    args = parser.parse_args()
    machine = Machine()
    table([machine._asdict()], title="assumed rates of one GPU and its share of a node")
    rows, figures = [], {}
    for name, work in cases(args.patches).items():
        terms = seconds(work, machine)
        slides = args.slides / args.gpus  # one after the other on each GPU
        binding = max(terms, key=lambda term: terms[term])
        hours = slides * (terms[binding] + (terms["fixed"] if binding != "fixed" else 0)) / 3600
        rows.append(
            {"case": name, **{f"{term} s": value for term, value in terms.items()}, "binds": binding, "epoch h": hours}
        )
        figures[f"{name}: hours an epoch"] = round(hours, 3)
        figures[f"{name}: binds"] = binding
    table(
        rows, title=f"a step on one slide of {args.patches:,} patches, and an epoch of {args.slides:,} on {args.gpus} GPUs"
    )
    return report("cost", figures, {})


if __name__ == "__main__":
    raise SystemExit(main())
