"""The laws on a CUDA device: float32, bfloat16 autocast, torch.compile, the fused state pass."""

import pytest
import torch
from laws.zoo import DIM, encoders
from torch import nn

from distset import UMBC, Exact, Features, Full, InMemory, Sampled, encode_set
from distset.kernels import fused_pool, wide_product
from distset.sets import Chunk
from distset.testing import check_encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
ZOO = encoders()


def model() -> nn.Module:
    torch.manual_seed(1)
    return Features(nn.Sequential(nn.Linear(32, 64), nn.GELU()), UMBC(64, 16, residual=True)).cuda()


def gradients(encoder, set_, grad, seed=0):
    z = encode_set(encoder, set_, grad=grad, seed=seed)
    return z, torch.autograd.grad((z + 0.3).sin().sum(), list(encoder.parameters()))


def assert_close(got, want, relative):
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= relative * b.norm() + 1e-12


@pytest.mark.parametrize("name", ZOO)
def test_laws_in_float64(name):
    check_encoder(ZOO[name].cuda().eval(), torch.randn(11, DIM).cuda())


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_float32(where):
    """Elements on the device or streamed to it from the host; the reference is the CPU in float64."""
    encoder, x = model(), torch.randn(5000, 32)
    set_ = InMemory(x.to(where), 512)
    z, got = gradients(encoder, set_, Exact())
    _, full = gradients(encoder, set_, Full())
    want_z, want = gradients(model().cpu().double(), InMemory(x.double()), Full())
    torch.testing.assert_close(z.cpu().double(), want_z, rtol=1e-4, atol=1e-5)
    assert_close([g.cpu().double() for g in got], want, 1e-3)
    assert_close(got, full, 1e-3)


def test_elements_on_the_device_for_an_encoder_on_the_host():
    """A copy to the host is over when it is used, however busy the device."""
    for _ in range(5):
        torch.cuda._sleep(50_000_000)
        late = torch.ones(4_000_000, 1, device="cuda")
        assert Chunk(late).to(torch.device("cpu")).elements.sum() == len(late)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device here")
def test_dropout_on_a_device_that_is_not_the_current_one():
    encoder = Features(nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5)), UMBC(64, 4)).to("cuda:1")
    before = torch.cuda.get_rng_state(0)
    set_ = InMemory(torch.randn(500, 32), 100)
    _, got = gradients(encoder, set_, Exact())
    _, want = gradients(encoder, set_, Full())
    assert_close(got, want, 1e-3)
    assert torch.equal(torch.cuda.get_rng_state(0), before)


def test_bfloat16_autocast():
    encoder, x = model(), torch.randn(20_000, 32, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        z, got = gradients(encoder, InMemory(x, 2048), Exact())
        _, full = gradients(encoder, InMemory(x, 2048), Full())
    want_z, want = gradients(encoder, InMemory(x), Full())
    assert (z - want_z).norm() <= 2e-2 * want_z.norm()
    assert_close(got, full, 2e-2)
    assert_close(got, want, 5e-2)


def test_dropout_is_replayed():
    encoder = Features(nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5)), UMBC(64, 8)).cuda().double()
    set_ = InMemory(torch.randn(100, 32, device="cuda", dtype=torch.float64), 16)
    for grad in (Exact(), Sampled(7)):
        _, got = gradients(encoder, set_, grad)
        _, want = gradients(encoder, set_, Full())
        assert_close(got, want, 1e-10)


def test_compiled():
    encoder, x = model(), torch.randn(4096, 32, device="cuda")
    z, got = gradients(torch.compile(encoder), InMemory(x, 512), Exact())
    want_z, want = gradients(encoder, InMemory(x, 512), Exact())
    torch.testing.assert_close(z, want_z, rtol=1e-3, atol=1e-4)
    assert_close(got, want, 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d", "slots"), [(100_003, 512, 64), (70, 128, 3), (4096, 64, 17), (9_999, 256, 64)])
def test_fused_pool(n, d, slots, dtype):
    """The fused pass against a float64 softmax of the same rounded operands, with logits up to about 30."""
    keys, x = 2 * torch.randn(slots, d, device="cuda") / d**0.5, 3 * torch.randn(n, d, device="cuda").to(dtype)
    total, mass, shift = fused_pool(keys, x)
    logits = keys.to(dtype).double() @ x.double().T
    torch.testing.assert_close(shift.double(), logits.amax(-1, keepdim=True), rtol=1e-4, atol=1e-3)
    value = (total / mass).double()
    want = torch.softmax(logits, -1) @ x.double()
    tolerance = 2 * torch.finfo(dtype).eps * x.double().abs().amax()  # weights are rounded once to dtype
    assert (value - want).abs().max() <= tolerance
    torch.testing.assert_close((mass.log() + shift).double().squeeze(-1), torch.logsumexp(logits, -1), rtol=1e-4, atol=1e-3)


def test_wide_product():
    a = torch.randn(3, 8, 64, device="cuda", requires_grad=True)
    b = torch.randn(64, 500, device="cuda").bfloat16().requires_grad_()
    out = wide_product(a, b)
    want = a.detach().bfloat16().double() @ b.detach().double()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4)
    out.sin().sum().backward()
    double = [t.detach().double().requires_grad_() for t in (a, b)]
    (double[0] @ double[1]).sin().sum().backward()
    assert_close([a.grad.double()], [double[0].grad], 0.1)
    assert_close([b.grad.double()], [double[1].grad], 0.1)
