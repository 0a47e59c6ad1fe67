"""The published encoders of images and of drugs with proteins: their sizes, what they look at and what they do not."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distset import InMemory
from distset.data.affinities import DRUG_LETTERS, LENGTHS, TARGET_LETTERS, letter_codes
from distset.set_functions import SetFunction, published_recognition, published_utility
from distset.tasks import offer_encoders
from distset.tasks.offer_encoders import DeepDTA, ImageCNN
from distset.tasks.oracle import diffmf_task
from distset.train import Example

DRUGS = ["CCO", "CC(=O)OC1=CC=CC=C1C(=O)O", "C[C@@H](N)C(=O)O.Cl", "C" * 130]
PROTEINS = ["MKT", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQ", "MX" * 30, "GAVLI" * 250]


def pairs(lengths=LENGTHS) -> torch.Tensor:
    """All 16 pairs, ``(4, 4, dim)``."""
    drugs = torch.stack([letter_codes(text, DRUG_LETTERS, lengths[0]) for text in DRUGS])
    proteins = torch.stack([letter_codes(text, TARGET_LETTERS, lengths[1]) for text in PROTEINS])
    return torch.cat([drugs.unsqueeze(1).expand(4, 4, -1), proteins.unsqueeze(0).expand(4, 4, -1)], -1)


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in module.named_parameters() if name.endswith("weight")]


def test_sizes_are_the_published_ones():
    assert shapes(ImageCNN(3 * 64 * 64)) == [(32, 3, 3, 3), (64, 32, 4, 4), (128, 64, 5, 5), (256, 128)]
    drug = [(32, 41, 4), (64, 32, 6), (96, 64, 8), (256, 96)]
    protein = [(32, 20, 4), (64, 32, 8), (96, 64, 12), (256, 96)]
    assert shapes(DeepDTA(1100)) == [*drug, *protein, (256, 512)]
    strides = [layer.stride for layer in ImageCNN(3 * 64 * 64).convolutions if isinstance(layer, nn.Conv2d)]
    assert strides == [(2, 2)] * 3
    assert (len(set(DRUG_LETTERS)), len(set(TARGET_LETTERS))) == (len(DRUG_LETTERS), len(TARGET_LETTERS)) == (41, 20)
    assert LENGTHS == offer_encoders.LENGTHS


def test_an_image_is_channels_first_its_values_from_minus_one_to_one():
    torch.manual_seed(0)
    encoder = ImageCNN(3 * 26 * 26, 7).double()
    images = torch.rand(2, 5, 3, 26, 26, dtype=torch.float64)
    x = (images[1, 3] - 0.5) / 0.5
    for layer in encoder.convolutions:
        x = layer(x)
    wanted = encoder.out(x.flatten(1).max(-1).values)
    found = encoder(images.flatten(2))
    assert found.shape == (2, 5, 7)
    torch.testing.assert_close(found[1, 3], wanted, rtol=1e-12, atol=1e-12)
    whole = (images * 255).round().to(torch.uint8).flatten(2)
    torch.testing.assert_close(encoder(whole), encoder(whole.double() / 255), rtol=1e-12, atol=1e-12)
    assert ImageCNN(28 * 28, 3)(torch.rand(4, 784)).shape == (4, 3)


def bare(tower: nn.Module, sequence: str, letters: str) -> torch.Tensor:
    """The published tower on the sequence alone: one-hot, convolutions, maximum over all that comes out."""
    x = torch.zeros(len(letters), len(sequence), dtype=torch.float64)
    for place, letter in enumerate(sequence):
        if letter in letters:
            x[letters.index(letter), place] = 1
    x = F.pad(x, (0, max(0, tower.field - len(sequence))))
    for convolution in tower.convolutions:
        x = F.relu(convolution(x))
    return tower.out(x.max(-1).values)


def test_pairs_are_encoded_letter_by_letter_whatever_the_padding(monkeypatch):
    torch.manual_seed(0)
    encoder = DeepDTA(1100, 6).double()
    found = encoder(pairs())
    assert found.shape == (4, 4, 6)
    for i, drug in enumerate(DRUGS):
        for j, protein in enumerate(PROTEINS):
            one = bare(encoder.drug, drug[:100], DRUG_LETTERS)
            other = bare(encoder.protein, protein[:1000], TARGET_LETTERS)
            torch.testing.assert_close(found[i, j], encoder.out(torch.cat([one, other])), rtol=1e-10, atol=1e-10)
    wider = DeepDTA(1700, 6, lengths=(150, 1550)).double()
    wider.load_state_dict(encoder.state_dict())
    some = slice(0, 3)  # the last ones are cut by the shorter length
    torch.testing.assert_close(wider(pairs((150, 1550)))[some, some], found[some, some], rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(offer_encoders, "AT_ONCE", 1)
    torch.testing.assert_close(encoder(pairs().double()), found, rtol=1e-10, atol=1e-10)  # codes may come as real numbers


def test_letters_become_codes():
    assert letter_codes("CxN", "CN", 5).tolist() == [1, 3, 2, 0, 0]
    assert letter_codes("CNCNCN", "CN", 4).tolist() == [1, 2, 1, 2]
    for nothing in ("", "123"):
        with pytest.raises(ValueError, match=f"sequence: got '{nothing}', wanted one of the letters CN"):
            letter_codes(nothing, "CN", 4)


@pytest.mark.parametrize("encoder", [ImageCNN, DeepDTA])
def test_all_parameters_learn_and_padding_says_nothing(encoder):
    torch.manual_seed(0)
    elements = pairs().flatten(0, 1)[None, :9] if encoder is DeepDTA else torch.rand(1, 9, 3 * 25 * 25)
    utility = published_utility(elements.shape[-1], width=8, hidden=9, encoder=encoder)
    mask = torch.arange(9).unsqueeze(0) < 7
    subsets = (torch.rand(1, 3, 9) < 0.5) & mask.unsqueeze(-2)
    value = utility(elements, subsets, mask)
    torch.testing.assert_close(value, utility(elements[:, :7], subsets[..., :7]), rtol=1e-5, atol=1e-6)
    general = SetFunction.gains(utility, elements, subsets, mask)[..., :7]
    torch.testing.assert_close(utility.gains(elements, subsets, mask)[..., :7], general, rtol=1e-4, atol=1e-5)
    value.sin().sum().backward()
    guess = published_recognition(elements.shape[-1], rank=2, width=8, hidden=9, encoder=encoder)
    found = guess(elements)
    (found.logits.sum() + found.factors.sum() + found.noise.sum()).backward()
    for module in (utility.encoder, guess.trunk[0]):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize(("make", "said"), [
    (lambda: ImageCNN(2), "encoder: got elements of 2 values, wanted square images of 1 or 3 channels and at least 25"),
    (lambda: ImageCNN(24 * 24), "encoder: got elements of 576 values"),
    (lambda: DeepDTA(128), r"got elements of 128 numbers, wanted the coded letters .* 100 \+ 1000.*features=sequences"),
    (lambda: DeepDTA(1100)(torch.rand(3, 1100)), "elements: got numbers from .* wanted whole ones from 0 to 42"),
    (lambda: DeepDTA(1100)(torch.full((3, 1100), 25)), "elements: .* wanted whole ones from 0 to 21"),
    (lambda: DeepDTA(1100)(torch.full((3, 1100), -1)), "elements: got numbers from -1 to -1"),
    (lambda: published_utility(1100, nonlinear=True, encoder=DeepDTA), "nonlinear: got True with an encoder"),
])  # fmt: skip
def test_what_does_not_fit_is_said(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_letters_without_their_encoder_are_refused_and_any_module_is_an_encoder():
    example = Example(InMemory(pairs()), torch.arange(4).expand(4, 4) < 2)
    with pytest.raises(ValueError, match=r"elements: got torch.uint8 for a network that begins with nn.Linear.*deepdta"):
        diffmf_task(1100).loss(example, seed=0)
    assert diffmf_task(1100, encoder=DeepDTA, width=8, hidden=8).loss(example, seed=0).isfinite()

    task = diffmf_task(6, encoder=functools.partial(Bag, hashes=40), width=8)
    ids = InMemory(torch.randint(0, 40, (1, 5, 6)))
    task.loss(Example(ids, torch.arange(5).expand(1, 5) < 2), seed=0).backward()
    assert task.model.utility.encoder.weight.grad.abs().sum() > 0


class Bag(nn.EmbeddingBag):
    """An element is ``dim`` ids, its code the mean of their rows."""

    def __init__(self, dim, width, hashes):
        super().__init__(hashes, width)

    def forward(self, ids):
        return super().forward(ids.flatten(0, -2)).reshape(*ids.shape[:-1], -1)
