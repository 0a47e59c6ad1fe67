"""Products that keep float32 sums under half-precision elements on a GPU, and the fused state pass in Triton.

Everything here has a plain counterpart in `distset.encoders`; nothing is needed for a right answer, only for a fast one.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without Triton
    triton = None

__all__ = ["fused_pool", "fused_pool_fits", "wide_product"]

HALVES = (torch.bfloat16, torch.float16)
BLOCK_N = 64


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of CUDA matrices rounded to ``b``'s half precision, summed and returned in float32; differentiable."""
    return _WideProduct.apply(a, b)


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _batched(a.to(b.dtype), b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        half = grad.to(b.dtype)
        grad_a = _unbroadcast(_batched(half, b.mT), a) if ctx.needs_input_grad[0] else None
        grad_b = _unbroadcast(_batched(a.to(b.dtype).mT, half), b) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


def _batched(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == b.dim() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*batch, *a.shape[-2:]).flatten(0, -3), b.expand(*batch, *b.shape[-2:]).flatten(0, -3)
    return torch.bmm(a, b, out_dtype=torch.float32).unflatten(0, batch)


def _unbroadcast(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum_to_size(like.shape).to(like.dtype)


def fused_pool_fits(keys_KD: Tensor, x_ND: Tensor) -> bool:
    """Whether `fused_pool` takes these: half precision on a GPU with Triton, 2-D, up to 64 slots, width 64 to 512."""
    return (
        triton is not None
        and x_ND.is_cuda
        and x_ND.dtype in HALVES
        and x_ND.dim() == keys_KD.dim() == 2
        and x_ND.stride(-1) == 1
        and len(keys_KD) <= 64
        and x_ND.shape[-1] in (64, 128, 256, 512)
        and _proved(x_ND.device, x_ND.dtype, x_ND.shape[-1])
    )


@lru_cache
def _processors(device: torch.device) -> int:
    """Programs that run at once; a few where Triton interprets on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache
def _proved(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the fused pass compiles for this device and agrees with the plain one: a kernel is not trusted unseen."""
    generator = torch.Generator(device).manual_seed(0)
    keys = torch.randn(5, width, device=device, generator=generator) / width**0.5
    x = torch.randn(1000, width, device=device, generator=generator).to(dtype)
    try:
        total, mass, _ = fused_pool(keys, x)
    except Exception as error:  # a compiler's errors have no common base
        warnings.warn(f"the fused state pass does not run on {device} ({error}); the plain one is used", stacklevel=2)
        return False
    want = torch.softmax(keys.to(dtype).float() @ x.float().T, -1) @ x.float()
    close = bool(((total / mass - want).abs().amax() <= 4 * torch.finfo(dtype).eps).item())
    if not close:
        warnings.warn(f"the fused state pass is inexact on {device}; the plain one is used", stacklevel=2)
    return close


def fused_pool(keys_KD: Tensor, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax state ``(total (K, D), mass (K, 1), shift (K, 1))`` of elements under folded keys; reads them once.

    Each program keeps a running maximum over a contiguous run of elements; the runs' states are merged in one fixed
    order, so that the result repeats.
    """
    (n, d), slots = x_ND.shape, len(keys_KD)
    keys = torch.nn.functional.pad(keys_KD.to(x_ND.dtype), (0, 0, 0, 64 - slots)).contiguous()
    tiles = triton.cdiv(n, BLOCK_N)
    programs = min(tiles, _processors(x_ND.device))
    total = torch.empty(programs, 64, d, device=x_ND.device)
    mass, shift = torch.empty(2, programs, 64, 1, device=x_ND.device)
    _fused_pool[(programs,)](
        x_ND, keys, total, mass, shift, n, x_ND.stride(0), triton.cdiv(tiles, programs),
        D=d, BLOCK=BLOCK_N, num_warps=8, num_stages=2,
    )  # fmt: skip
    top = shift.amax(0)
    scale = torch.exp(shift - top)
    return (total * scale).sum(0)[:slots], (mass * scale).sum(0)[:slots], top[:slots]


if triton is not None:

    @triton.jit
    def _fused_pool(X, KEYS, TOTAL, MASS, SHIFT, n, stride, tiles, D: tl.constexpr, BLOCK: tl.constexpr):
        program = tl.program_id(0)
        slots, width, rows = tl.arange(0, 64), tl.arange(0, D), tl.arange(0, BLOCK)
        keys = tl.load(KEYS + slots[:, None] * D + width[None, :])
        total = tl.zeros((64, D), tl.float32)
        mass = tl.zeros((64,), tl.float32)
        shift = tl.full((64,), -3.4028234663852886e38, tl.float32)
        start = program.to(tl.int64) * tiles * BLOCK
        for tile in range(tiles):
            ids = start + tile * BLOCK + rows
            inside = ids < n
            x = tl.load(X + ids[:, None] * stride + width[None, :], mask=inside[:, None], other=0.0)
            logits = tl.dot(keys, tl.trans(x))
            logits = tl.where(inside[None, :], logits, float("-inf"))
            top = tl.maximum(shift, tl.max(logits, 1))
            weights = tl.exp(logits - top[:, None])
            scale = tl.exp(shift - top)
            mass = mass * scale + tl.sum(weights, 1)
            total = tl.dot(weights.to(x.dtype), x, total * scale[:, None])
            shift = top
        at = program * 64 + slots
        tl.store(TOTAL + at[:, None] * D + width[None, :], total)
        tl.store(MASS + at, mass)
        tl.store(SHIFT + at, shift)
