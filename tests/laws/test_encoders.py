"""Every encoder against the laws of its kind, by enumeration in float64."""

import pytest
import torch
from laws.zoo import DIM, encoders, with_dropout
from torch import nn

from distset import UMBC, ChunkEncoder, Exact, Features, Full, InMemory, Sampled, Subset, encode_set
from distset.encoders.pooling import streamed_softmax_state
from distset.states import Mean
from distset.testing import check_encoder, check_gradient, mean_gradient

ZOO = encoders()


@pytest.mark.parametrize("name", ZOO)
def test_any_partition_any_strategy(name):
    errors = check_encoder(ZOO[name].eval(), torch.randn(11, DIM, dtype=torch.float64))
    assert errors.value <= 1e-10
    assert errors.exact <= 1e-10
    assert errors.sampled <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name != "ds-mil"])  # whose two stages square the choices
def test_up_to_four_sampled_chunks(name):
    set_ = InMemory(torch.randn(10, DIM, dtype=torch.float64), bounds=[0, 1, 5, 7, 10])
    exact, sampled = check_gradient(ZOO[name].double().train(), set_, max_sampled=4)
    assert exact <= 1e-10
    assert sampled <= 1e-8


@pytest.mark.parametrize("name", ["umbc-softmax-folded", "umbc-slot-exp-projected", "deepsets-max", "sse", "ds-mil"])
def test_padded_batches(name):
    """A padded batch gives each set what it gets alone, whatever stands in the padding, with gradients that are right."""
    encoder = ZOO[name].double().eval()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    x[1, 4:] = 1e3
    check_encoder(encoder, x, mask=mask)
    if name not in ("umbc-softmax-folded", "umbc-slot-exp-projected", "sse"):  # random slots differ between sets
        together = _first(encode_set(encoder, InMemory(x, 4, mask=mask), seed=1))
        alone = _first(encode_set(encoder, InMemory(x[1, :4]), seed=1))
        torch.testing.assert_close(together[1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_sampled_up_to_all_chunks(m):
    encoder = ZOO["umbc-softmax-folded"].double().eval()
    set_ = InMemory(torch.randn(10, DIM, dtype=torch.float64), bounds=[0, 1, 5, 7, 10])
    want = mean_gradient(encoder, set_, Exact())
    for choice in ("uniform", "stratified", "weighted"):
        got = mean_gradient(encoder, set_, Sampled(m, choice))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_dropout_and_random_slots():
    """In training mode the replayed chunk is the same function: the laws hold with everything random on."""
    encoder = with_dropout().double().train()
    set_ = InMemory(torch.randn(10, DIM, dtype=torch.float64), bounds=[0, 1, 5, 7, 10])
    exact, sampled = check_gradient(encoder, set_, max_sampled=3)
    assert exact <= 1e-10
    assert sampled <= 1e-8


def test_subset_is_biased():
    """Even a linear functional of the encoding has a wrong mean gradient under Subset; Sampled's is right."""
    encoder = UMBC(DIM, 3, residual=True).double()
    set_ = InMemory(3 * torch.randn(12, DIM, dtype=torch.float64), 3)
    want = torch.cat([g.flatten() for g in mean_gradient(encoder, set_, Exact())])
    subset = torch.cat([g.flatten() for g in mean_gradient(encoder, set_, Subset(1))])
    sampled = torch.cat([g.flatten() for g in mean_gradient(encoder, set_, Sampled(1))])
    assert (subset - want).norm() > 0.1 * want.norm()
    assert (sampled - want).norm() < 1e-10 * want.norm()


def test_residual_is_not_scaled():
    """What the slots feed beside the chunk sums has its plain gradient under Sampled: the defect of published code."""
    encoder = UMBC(DIM, 3, residual=True).double()
    for p in [*encoder.to_value.parameters()]:
        p.data.zero_()  # pooled values are 0, so the slots act through the residual alone
    set_ = InMemory(torch.randn(12, DIM, dtype=torch.float64), 3)
    full = torch.autograd.grad(encode_set(encoder, set_, grad=Full()).square().sum(), encoder.mu)[0]
    for seed in range(4):
        one = torch.autograd.grad(encode_set(encoder, set_, grad=Sampled(1), seed=seed).square().sum(), encoder.mu)[0]
        torch.testing.assert_close(one, full, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 500.0])
@pytest.mark.parametrize("shift", [-500.0, 0.0, 500.0])
def test_softmax_is_exact_for_large_logits(scale, shift):
    """Logits scaled up to 500 and shifted by 500 either way, float32 chunks against a float64 softmax of the same logits."""

    class Logits(ChunkEncoder):
        """Attention whose logits and values are the elements themselves."""

        def encode(self, chunk, query):
            from distset.encoders.pooling import softmax_state

            return softmax_state(chunk.elements[..., :1].mT, chunk.elements[..., 1:], chunk.mask, True)

    logits = (torch.rand(4096, 1) * 2 - 1) * scale + shift
    values = torch.randn(4096, 3)
    got = encode_set(Logits(), InMemory(torch.cat([logits, values], -1), 100))
    want = torch.softmax(logits.double(), 0).mT @ values.double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["rising", "falling", "jump", "drop", "small", "tame"])
def test_streamed_sweep_is_exact_for_any_logits(order, dtype):
    """Logits that leave the range of floats in any order, other slots tame beside them, against a float64 softmax."""
    ramp = {
        "rising": torch.linspace(-400, 400, 1000),
        "falling": torch.linspace(400, -400, 1000),
        "jump": torch.cat([torch.zeros(500), torch.full((500,), 300.0)]),
        "drop": torch.cat([torch.full((500,), 300.0), torch.full((500,), -300.0)]),
        "small": torch.linspace(-320, -300, 1000),
        "tame": torch.linspace(-3, 3, 1000),
    }[order]
    x = torch.stack([ramp, torch.randn(1000), torch.ones(1000)], -1).to(dtype)
    keys = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 2.0]], dtype=dtype)
    state = streamed_softmax_state(keys, x, block=64)
    logits = keys.double() @ x.double().T
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        state.value().double(), torch.softmax(logits, -1) @ x.double(), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(state.log_mass().double(), logits.logsumexp(-1), rtol=tolerance, atol=tolerance)


def test_states_stay_float32_under_bfloat16():
    """A million bfloat16 elements: the mean is kept to float32, where a bfloat16 state would lose everything."""
    x = torch.randn(1_000_000, 4).add_(1.0).bfloat16()

    class Average(ChunkEncoder):
        def encode(self, chunk, query):
            from distset.encoders.pooling import accumulable

            return Mean(accumulable(chunk.elements).sum(-2), chunk.counts(torch.float32))

    umbc = UMBC(4, 2).bfloat16().eval()
    sets = InMemory(x, 4096)
    with torch.no_grad():
        mean, pooled = encode_set(Average(), sets), encode_set(umbc, sets)
        want = encode_set(UMBC.double(umbc), InMemory(x.double(), 65536))
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled.double(), want, rtol=0, atol=2**-6)  # the slots' keys are rounded to bfloat16


def test_images_through_a_cnn():
    cnn = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    check_encoder(Features(cnn, UMBC(3, 2)).eval(), torch.randn(7, 1, 6, 6), element_ndim=3)


def test_batch_of_image_sets():
    cnn = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    check_encoder(Features(cnn, UMBC(3, 2)).eval(), torch.randn(2, 6, 1, 5, 5), element_ndim=3, max_sampled=1)


def test_a_broken_encoder_is_found():
    class PerChunkSoftmax(ChunkEncoder):
        """What people write first: a softmax normalised within the chunk."""

        def __init__(self):
            super().__init__()
            self.score = nn.Linear(DIM, 1)

        def encode(self, chunk, query):
            pooled = torch.softmax(self.score(chunk.elements), -2).mT @ chunk.elements
            return Mean(pooled.squeeze(-2), torch.ones((), dtype=pooled.dtype))

    with pytest.raises(AssertionError, match="depends on the partition"):
        check_encoder(PerChunkSoftmax(), torch.randn(9, DIM))


def _first(value):
    return value[0] if isinstance(value, tuple) else value
