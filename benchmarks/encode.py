"""The state pass against the published formulation, and the gradients against full autograd.

    python -m benchmarks.encode [--full] [--device cuda]

On a CPU: 64 slots, width 128, chunks of 256 to 8,192 elements. On a GPU: 10^6 elements, 64 slots, width 512, as shares
of the matrix-product and copy rates (bytes read and written) measured in the same run.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from benchmarks.report import report, table
from benchmarks.timing import best_times, matmul_peak
from distset import UMBC, Exact, Features, Full, InMemory, Sampled, encode_set

CHUNKS = (256, 512, 1024, 2048, 4096, 8192)


def published_pass(encoder: UMBC, x_ND: Tensor, chunk: int) -> Tensor:
    """The published form: project K and V, scale both sides, clamp, exponentiate, multiply; add up over chunks."""

    def split(t: Tensor) -> Tensor:
        return t.reshape(1, -1, encoder.heads, encoder.width).transpose(1, 2)

    scale = math.sqrt(1 / math.sqrt(encoder.width))
    total, mass = 0.0, 0.0
    for start in range(0, len(x_ND), chunk):
        x = x_ND[None, start : start + chunk]
        q, k, v = split(encoder.to_query(encoder.mu)), split(encoder.to_key(x)), split(encoder.to_value(x))
        weights = torch.einsum("bhkd,bhsd->bhks", q * scale, k * scale).clamp(max=10).exp()
        total = total + torch.einsum("bhks,bhsd->bhkd", weights, v)
        mass = mass + weights.sum(-1, keepdim=True)
    return (total / (mass + 1e-20)).transpose(1, 2).reshape(encoder.slots, -1)


def lean_pass(encoder: UMBC, x_ND: Tensor, chunk: int) -> Tensor:
    """The same without its detours (one scaling, no clamp, no copies): the leanest form that projects every element."""
    q = encoder._split(encoder.to_query(encoder.mu)) / math.sqrt(encoder.width)
    total, mass = 0.0, 0.0
    for start in range(0, len(x_ND), chunk):
        x = x_ND[start : start + chunk]
        weights = (q @ encoder._split(encoder.to_key(x)).mT).exp()
        total = total + weights @ encoder._split(encoder.to_value(x))
        mass = mass + weights.sum(-1, keepdim=True)
    return (total / mass).transpose(0, 1).reshape(encoder.slots, -1)


def state_passes(elements: int, rounds: int) -> tuple[dict[str, float], dict[str, tuple[float, str, float]]]:
    x = torch.randn(elements, 128)
    figures: dict[str, float] = {}
    square, worst = torch.randn(1024, 1024), {}
    for heads in (1, 4):
        encoder = UMBC(128, 64, heads=heads).eval()
        _assert_same(encoder, x[:5000])
        rows = []
        for chunk in CHUNKS:
            times = best_times(
                {
                    "matmul": lambda: square @ square,
                    "published": lambda c=chunk, e=encoder: published_pass(e, x, c),
                    "lean": lambda c=chunk, e=encoder: lean_pass(e, x, c),
                    "distset": lambda c=chunk, e=encoder: encode_set(e, InMemory(x, c)),
                },
                rounds=rounds,
            )
            peak = 2 * 1024**3 / times.pop("matmul")
            flops = elements * 4 * 64 * 128 if encoder.fold else elements * (4 * 128 * 128 + 4 * 64 * 128)
            rows.append(
                {"chunk": chunk}
                | {f"{name} ms": 1e3 * seconds for name, seconds in times.items()}
                | {
                    "published/distset": times["published"] / times["distset"],
                    "lean/distset": times["lean"] / times["distset"],
                    "share of matmul peak": flops / times["distset"] / peak,
                }
            )
        table(rows, title=f"state pass, {elements:,} x 128, 64 slots, {heads} heads, {torch.get_num_threads()} threads")
        worst[heads] = min(row["published/distset"] for row in rows)
        for column, name in (
            ("published/distset", "ratio"),
            ("lean/distset", "lean ratio"),
            ("share of matmul peak", "peak share"),
        ):
            figures[f"{name}, {heads} heads, worst"] = round(min(row[column] for row in rows), 3)
    return figures, {"state pass, 1 head": (worst[1], ">=", 3.0), "state pass, 4 heads": (worst[4], ">=", 1.0)}


def gradient_steps(elements: int, rounds: int) -> tuple[dict[str, float], dict[str, tuple[float, str, float]]]:
    x = torch.randn(elements, 64)
    model = Features(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128)), UMBC(128, 64, residual=True))
    chunks = InMemory(x, elements // 32)

    def step(grad: object, set_: InMemory) -> None:
        model.zero_grad()
        encode_set(model, set_, grad=grad, seed=0).square().sum().backward()  # type: ignore[arg-type]

    strategies = {"full": Full(), "exact": Exact(), "sampled 1": Sampled(1), "sampled 4": Sampled(4)}
    times = best_times({name: lambda g=g: step(g, chunks) for name, g in strategies.items()}, rounds=rounds)
    table(
        [{"gradient": name, "ms": 1e3 * t, "of full": t / times["full"]} for name, t in times.items()],
        title=f"training step, {elements:,} elements in 32 chunks, MLP 64-128-128 and 64 slots inside the encoder",
    )
    ratios = {name: t / times["full"] for name, t in times.items()}
    figures = {f"{name} / full": round(ratio, 3) for name, ratio in ratios.items() if name != "full"}
    return figures, {"exact": (ratios["exact"], "<=", 1.4), "sampled 1 of 32": (ratios["sampled 1"], "<=", 0.4)}


def on_gpu(elements: int, rounds: int) -> tuple[dict[str, float], dict[str, tuple[float, str, float]]]:
    device = torch.device("cuda")
    figures: dict[str, float] = {}
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(elements, 512, device=device).to(dtype)
        peak = matmul_peak(device, dtype, 8192)
        copy = 2 * x.nbytes / best_times({"copy": x.clone}, rounds=5)["copy"]
        for chunk in (16_384, 65_536, 262_144, elements):
            encoder = UMBC(512, 64).to(device)
            set_ = InMemory(x, chunk)

            def sweep(e: UMBC = encoder, s: InMemory = set_) -> None:
                with torch.no_grad():
                    encode_set(e, s, seed=0)

            def step(e: UMBC = encoder, s: InMemory = set_) -> None:
                encode_set(e, s, grad=Exact(), seed=0).square().sum().backward()

            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                times = best_times({"state": sweep, "exact": step}, rounds=rounds)
            # Least work: each sweep reads the set once; two products a sweep, and two more backward (to keys and weights).
            for what, products, reads in (("state", 2, 1), ("exact", 6, 2)):
                floor_flops = products * 2 * elements * 64 * 512 / peak
                floor_bytes = reads * x.nbytes / copy
                nearer = max(floor_flops, floor_bytes)
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "chunk": chunk,
                        "what": what,
                        "ms": 1e3 * times[what],
                        "share of matmul": floor_flops / times[what],
                        "share of copy": floor_bytes / times[what],
                        "share of nearer": nearer / times[what],
                    }
                )
        figures[f"matmul peak TFLOP/s, {dtype}"] = round(peak / 1e12, 1)
        figures[f"copy TB/s, {dtype}"] = round(copy / 1e12, 2)
        del x
    table(rows, title=f"{torch.cuda.get_device_name()}: {elements:,} x 512, 64 slots")
    for dtype_name in ("bfloat16", "float32"):
        for what in ("state", "exact"):
            best = max(r["share of nearer"] for r in rows if r["dtype"] == dtype_name and r["what"] == what)
            figures[f"share of the nearer peak, {what}, {dtype_name}"] = round(best, 3)
    return figures, {}


def _assert_same(encoder: UMBC, x: Tensor) -> None:
    got = encode_set(encoder, InMemory(x, 512))
    torch.testing.assert_close(published_pass(encoder, x, 512), got, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lean_pass(encoder, x, 512), got, rtol=1e-4, atol=1e-5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more rounds, four times the elements")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            print("encode --device cuda: no CUDA device here, nothing was measured")
            return 0
        figures, bars = on_gpu(1_000_000, 10)
        return report("encode", figures, bars)
    torch.set_num_threads(2)
    scale = 4 if args.full else 1
    with torch.no_grad():
        figures, bars = state_passes(65_536 * scale, 25 if args.full else 8)
    more_figures, more_bars = gradient_steps(65_536 * scale, 10 if args.full else 4)
    return report("encode", figures | more_figures, bars | more_bars)


if __name__ == "__main__":
    raise SystemExit(main())
