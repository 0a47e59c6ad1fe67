"""Streams: the encoding of all elements, in any order, merged from several places, saved and restored."""

from __future__ import annotations

import pytest
import torch
from laws.zoo import DIM, encoders
from safetensors.torch import save_file

from distset import DSMIL, UMBC, DeepSets, InMemory, Stream, encode_set
from distset.encoders import AttentionPool, ChunkEncoder, Features
from distset.encoders.stream import fingerprint
from distset.states import TopK
from distset.tasks.document_models import deepsets, sse, umbc_set_transformer

X = torch.randn(48, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ONE_SWEEP = [name for name, encoder in encoders().items() if not hasattr(encoder, "stages")]


@pytest.fixture(params=ONE_SWEEP)
def encoder(request):
    torch.manual_seed(1)
    return encoders()[request.param].double().eval()


def flat(value):
    return torch.cat([part.reshape(-1) for part in value]) if isinstance(value, tuple) else value.reshape(-1)


def test_a_stream_is_the_encoding_at_any_time(encoder):
    stream = encoder.stream()
    for end in range(5, 49, 5):
        assert stream.add(X[end - 5 : end])
        whole = encode_set(encoder, InMemory(X[:end]), seed=0)
        torch.testing.assert_close(flat(stream.value()), flat(whole), atol=1e-12, rtol=1e-12)
        assert len(stream) == end


def test_order_and_retries_change_no_bit(encoder):
    chunks = list(X.split(4))
    straight, shuffled = encoder.stream(), encoder.stream()
    for chunk in chunks:
        straight.add(chunk)
    for number in [7, 0, 3, 3, 11, 1, 2, 10, 9, 0, 8, 4, 5, 6, 11]:
        shuffled.add(chunks[number], number)
    assert shuffled.num_chunks == 12
    assert not shuffled.add(chunks[5], 5)
    assert torch.equal(flat(straight.value()), flat(shuffled.value()))


def test_streams_of_several_places_merge(encoder):
    chunks = list(X.split(4))
    whole, first, second = encoder.stream(), encoder.stream(), encoder.stream()
    for number, chunk in enumerate(chunks):
        whole.add(chunk, number)
        (first if number % 3 else second).add(chunk, number)
    first.merge(second)
    assert torch.equal(flat(first.value()), flat(whole.value()))
    assert len(first) == len(X)
    with pytest.raises(ValueError, match="both have chunk"):
        first.merge(second)


def test_a_saved_stream_goes_on(encoder, tmp_path):
    chunks = list(X.split(4))
    whole, part = encoder.stream(seed=3), encoder.stream(seed=3)
    for number, chunk in enumerate(chunks):
        whole.add(chunk, number)
        if number not in (0, 5):
            part.add(chunk, number)
    part.save(tmp_path / "set.safetensors")
    again = Stream.load(encoder, tmp_path / "set.safetensors")
    for number in (5, 0):
        assert again.add(chunks[number], number)
    assert torch.equal(flat(again.value()), flat(whole.value()))
    with torch.no_grad():
        next(iter(encoder.parameters())).add_(1)
    with pytest.raises(ValueError, match="was made by an encoder of other weights"):
        Stream.load(encoder, tmp_path / "set.safetensors")


def test_no_gradients_and_each_part_keeps_its_mode():
    phi = torch.nn.Sequential(torch.nn.Linear(DIM, 4), torch.nn.Dropout(0.5), torch.nn.Dropout(0.5))
    encoder = UMBC(4, slots=2)
    whole = Features(phi, encoder).train()
    phi[2].eval()
    stream = whole.stream()
    stream.add(X[:5].float())
    value = stream.value()
    assert not value.requires_grad
    assert torch.equal(value, stream.value())
    assert [part.training for part in phi] == [True, True, False]
    assert whole.training


def test_settings_of_equal_weights_are_told_apart(tmp_path):
    one = UMBC(DIM, 4, activation="slot-sigmoid")
    other = UMBC(DIM, 4, activation="slot-softmax")
    other.load_state_dict(one.state_dict())
    stream = one.stream()
    stream.add(X[:5].float())
    stream.save(tmp_path / "set")
    with pytest.raises(ValueError, match="by an encoder of other weights or settings"):
        Stream.load(other, tmp_path / "set")
    with pytest.raises(ValueError, match="other: its encoder has other weights or settings"):
        other.stream().merge(stream)
    layers = [DeepSets(torch.nn.Sequential(torch.nn.Linear(DIM, 4), layer)) for layer in
              (torch.nn.ReLU(), torch.nn.Tanh(), torch.nn.LeakyReLU(0.1), torch.nn.LeakyReLU(0.2))]  # fmt: skip
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
    assert len(set(map(fingerprint, layers))) == 4
    assert fingerprint(layers[0].eval()) == fingerprint(layers[0].train())


def test_a_stream_of_an_earlier_version_is_refused(tmp_path):
    encoder = encoders()["sse"].eval()
    save_file({"like": X[:0]}, tmp_path / "old", metadata={"format": "distset stream 2", "weights": fingerprint(encoder)})
    with pytest.raises(ValueError, match="has the format 'distset stream 2', wanted 'distset stream 3'; encode"):
        Stream.load(encoder, tmp_path / "old")


NETWORK = torch.nn.Linear(DIM, 3)


@pytest.mark.parametrize(("encoder", "said"), [
    (UMBC(DIM, 4, fold=True), f"wanted width {DIM}"),
    (UMBC(DIM, 4, fold=False), f"wanted width {DIM}"),
    (AttentionPool(DIM), f"wanted width {DIM}"),
    (DeepSets(NETWORK), "on which the encoder fails"),
    (Features(NETWORK, UMBC(3, 4)), "on which the encoder fails"),
])  # fmt: skip
def test_a_first_chunk_of_a_foreign_width_is_refused(encoder, said):
    stream = encoder.stream()
    with pytest.raises(ValueError, match=rf"elements: got shape \(2, {DIM + 1}\).*{said}"):
        stream.add(torch.zeros(2, DIM + 1))
    assert stream.add(torch.zeros(2, DIM))
    if "width" in said:
        with pytest.raises(ValueError, match=said):
            encode_set(encoder, InMemory(torch.zeros(2, DIM + 1)))


def test_memory_is_a_state_for_each_gap():
    torch.manual_seed(0)
    stream = encoders()["sse"].double().eval().stream()
    for _ in range(1000):
        stream.add(X[:1])
    assert len(stream.nodes) == bin(1000).count("1")


@pytest.mark.parametrize(("elements", "said"), [
    (torch.zeros(3, DIM + 1), "wanted at least one element of shape"),
    (torch.zeros(0, DIM), "at least one element"),
    (torch.zeros(DIM), "got shape"),
    (torch.full((2, DIM), torch.nan), "NaN or infinite as torch.float64"),
    (torch.full((2, DIM), 1e308, dtype=torch.float64), "the encoder makes NaN or infinities of them"),
])  # fmt: skip
def test_bad_chunks_are_refused_and_change_nothing(elements, said):
    stream = encoders()["sse"].double().eval().stream()
    stream.add(X[:4])
    before = flat(stream.value())
    with pytest.raises(ValueError, match=said):
        stream.add(elements.double())
    assert torch.equal(flat(stream.value()), before)


def test_finite_is_what_the_encoder_computes_with():
    encoder = encoders()["sse"].eval()
    stream = encoder.stream()
    with pytest.raises(ValueError, match=r"NaN or infinite as torch\.float32"):
        stream.add(1e300 * torch.ones(2, DIM + 1, dtype=torch.float64))
    assert stream.add(X[:4])  # a chunk that was refused does not fix the shape of elements


def test_free_places_of_the_best_few_are_no_reason_to_refuse():
    class BestThree(ChunkEncoder):
        def encode(self, chunk, query):
            return TopK.of(chunk.elements[:, 0], chunk.elements, torch.arange(chunk.size), 3)

    stream = BestThree().stream()
    assert stream.add(X[:1])
    assert stream.add(X[1:2])
    assert stream.state().scores.isfinite().tolist() == [True, True, False]


def test_a_stream_of_words_is_saved_and_goes_on(tmp_path):
    torch.manual_seed(0)
    words = torch.randint(0, 30, (20, 1))
    for encoder, _ in (deepsets(30, 2, width=8), sse(30, 2, width=8, slots=4), umbc_set_transformer(30, 2, width=8)):
        whole, part = encoder.stream(), encoder.stream()
        for number, chunk in enumerate(words.split(4)):
            whole.add(chunk)
            if number != 2:
                part.add(chunk, number)
        part.save(tmp_path / "words")
        again = Stream.load(encoder, tmp_path / "words")
        assert again.add(words[8:12], 2)
        assert torch.equal(flat(again.value()), flat(whole.value()))


def test_an_empty_stream_of_images_is_saved(tmp_path):
    encoder = DeepSets(torch.nn.Flatten()).eval()
    encoder.stream(element_ndim=3, seed=4).save(tmp_path / "none")
    again = Stream.load(encoder, tmp_path / "none")
    assert (len(again), again.element_ndim, again.seed) == (0, 3, 4)


def test_what_cannot_be_streamed(tmp_path):
    with pytest.raises(ValueError, match="needs several sweeps"):
        Stream(DSMIL(DIM, classes=2, hidden=4))
    encoder = encoders()["sse"].double().eval()
    with pytest.raises(ValueError, match="nothing has come yet"):
        encoder.stream().value()
    with pytest.raises(ValueError, match="number: got -1"):
        encoder.stream().add(X, -1)
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(ValueError, match="cannot be read"):
        Stream.load(encoder, tmp_path / "other")
