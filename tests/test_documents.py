"""Long documents: what the model sees, loss and F1 against scikit-learn, gradients of every mode, BERT without positions."""

from __future__ import annotations

import functools
import json
import zipfile

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from sklearn.naive_bayes import MultinomialNB

from distset import UMBC, Exact, Full, InMemory, Sampled, Subset, encode_set
from distset.encoders import ACTIVATIONS
from distset.problems.texts import eurlex, movie_reviews
from distset.tasks import document_models as models
from distset.tasks.documents import document_task
from distset.train import Example

MAKERS = [models.deepsets, models.sse, models.umbc_set_transformer]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """40 short reviews, four of each fold, with words that give the class away."""
    path = tmp_path_factory.mktemp("reviews") / "movie_reviews.zip"
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for number in range(40):
            kind = ("neg", "pos")[number % 2]
            words = random.choice(["the", "film", "a", ("dull", "fine")[number % 2]], random.integers(5, 40))
            file.writestr(f"movie_reviews/{kind}/cv{number // 4}{number:02d}_1.txt", " ".join(words))
    return path


def small_task(maker, grad=None, multi_label=False):
    given = {"words": 30, "classes": ["no", "yes"], "multi_label": multi_label}
    return document_task(**given, model=functools.partial(maker, width=8), grad=grad)


def test_reviews_become_sets_of_words(reviews):
    parts = movie_reviews(str(reviews), fold=9, vocabulary=3, chunk_size=4)
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [32, 4, 4]
    assert parts.facts == {"words": 4, "classes": ["negative", "positive"], "multi_label": False}
    example = parts.test[0]
    assert example.set.elements.dtype == torch.int64
    assert example.set.elements.shape[1] == 1
    assert max(example.set.sizes) <= 4
    assert 0 <= int(example.set.elements.max()) < 4
    assert not {e.set.name for e in parts.train[:]} & {e.set.name for e in parts.test[:]}
    other = movie_reviews(str(reviews), fold=9, vocabulary=3, seed=1).test[0].set.elements
    assert sorted(other.flatten().tolist()) == sorted(example.set.elements.flatten().tolist())
    with pytest.raises(ValueError, match="fold: got 10"):
        movie_reviews(str(reviews), fold=10)


def test_the_simple_rule_is_that_of_sklearn(reviews):
    parts = movie_reviews(str(reviews), fold=2, vocabulary=4)

    def counts(part):
        return np.stack([np.bincount(e.set.elements.flatten().numpy(), minlength=5) for e in part[:]])

    rule = MultinomialNB().fit(counts(parts.train), [int(e.target[1]) for e in parts.train[:]])
    want = rule.score(counts(parts.test), [int(e.target[1]) for e in parts.test[:]])
    assert parts.baselines["naive_bayes"] == pytest.approx(want)


@pytest.mark.parametrize("maker", MAKERS)
def test_vectors_of_words_are_held(reviews, maker):
    """The training reviews give them, the model keeps them through a step, and its gradient in all else is the same."""
    parts = movie_reviews(str(reviews), vocabulary=5, chunk_size=4, vectors=3)
    vectors = parts.facts["vectors"]
    assert vectors.shape == (parts.facts["words"], 3)
    other = movie_reviews(str(reviews), fold=5, vocabulary=5, vectors=3).facts["vectors"]
    assert not torch.equal(vectors, other), "they come from the training reviews alone"
    task = document_task(**parts.facts, model=functools.partial(maker, width=8), grad=Exact())
    (table,) = (module for module in task.model.modules() if isinstance(module, torch.nn.Embedding))
    optimiser = torch.optim.AdamW(task.model.parameters(), lr=0.1, weight_decay=0.1)
    task.loss(parts.train[0], seed=0).backward()
    optimiser.step()
    assert table.weight.grad is None
    assert torch.equal(table.weight, vectors)
    assert all(p.grad is not None for p in task.model.parameters() if p is not table.weight)


def test_vectors_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"vectors: got \(4, 3\), wanted one row for each of the 5 words"):
        models.WordNetwork(5, 8, vectors=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="vectors: got a width of 3 for depth=0 and width=8"):
        models.WordNetwork(5, 8, depth=0, vectors=torch.zeros(5, 3))


@pytest.mark.parametrize("multi_label", [False, True])
def test_loss_and_f1_against_torch_and_sklearn(multi_label):
    task = small_task(models.deepsets, multi_label=multi_label)
    logits = torch.randn(20, 2)
    targets = torch.randint(2, (20, 2)).float()
    if not multi_label:
        targets = torch.nn.functional.one_hot(targets[:, 0].long(), 2).float()
    figures = task.metrics(list(logits), list(targets))
    if multi_label:
        want, found = torch.nn.BCEWithLogitsLoss()(logits, targets), logits > 0
        assert figures["micro_f1"] == pytest.approx(f1_score(targets, found, average="micro"))
    else:
        want, found = torch.nn.CrossEntropyLoss()(logits, targets.argmax(-1)), logits.argmax(-1)
        assert figures["micro_f1"] == pytest.approx(float((found == targets.argmax(-1)).float().mean()))
        assert figures["macro_f1"] == pytest.approx(f1_score(targets.argmax(-1), found, average="macro"))
    assert figures["loss"] == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("maker", [models.sse, models.umbc_set_transformer])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_models_with_slots_take_every_activation(maker, activation):
    task = small_task(functools.partial(maker, activation=activation))
    (pool,) = (module for module in task.model.encoder.modules() if isinstance(module, UMBC))
    assert pool.activation == activation
    task.model.double().eval()
    words = torch.randint(30, (20, 1))
    torch.testing.assert_close(task.predict(InMemory(words, 3)), task.predict(InMemory(words)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("maker", MAKERS)
def test_gradients_through_the_task(maker):
    """Exact is full autograd (dropout off); the mean of Sampled over its chunks too; Subset is not."""
    task = small_task(maker)
    task.model.double().eval()
    example = Example(InMemory(torch.randint(30, (20, 1)), 5), torch.tensor([0.0, 1.0]))

    def gradient(grad, seed=0):
        task.model.grad = grad
        task.model.zero_grad()
        task.loss(example, seed=seed).backward()
        return torch.cat([p.grad.flatten() for p in task.model.parameters() if p.grad is not None])

    full = gradient(Full())
    torch.testing.assert_close(gradient(Exact()), full, rtol=1e-9, atol=1e-12)
    drawn = {round(float(g.sum()), 10): g for g in (gradient(Sampled(1), seed) for seed in range(60))}
    assert len(drawn) == 4
    torch.testing.assert_close(torch.stack([*drawn.values()]).mean(0), full, rtol=1e-8, atol=1e-10)
    assert (gradient(Subset(1)) - full).norm() > 1e-3 * full.norm()


def test_bert_has_no_positions_and_trains():
    pytest.importorskip("transformers")
    task = small_task(models.umbc_bert)
    task.model.eval()
    words = InMemory(torch.randint(30, (25, 1)), 10)
    slots = encode_set(task.model.encoder, words)
    head = task.model.head
    order = torch.randperm(slots.shape[-2])
    torch.testing.assert_close(head(slots[order]), head(slots), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(torch.stack([slots, slots]))[1], head(slots), rtol=1e-4, atol=1e-5)
    task.loss(Example(words, torch.tensor([1.0, 0.0])), seed=0).backward()
    without = {name for name, p in task.model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without, "every parameter that is trained gets a gradient"


def test_bert_from_a_local_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    saved = transformers.BertModel(config)
    saved.save_pretrained(tmp_path)
    found = models.SlotBert(8, 4, weights=str(tmp_path))
    name = "encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(found.bert.state_dict()[name], saved.state_dict()[name])
    with pytest.raises(ValueError, match=r"weights: .* is 8 wide .* wanted width=16"):
        models.SlotBert(16, 4, weights=str(tmp_path))
    with pytest.raises(ValueError, match=r"weights: .* has no config.json"):
        models.SlotBert(8, 4, weights=str(tmp_path / "none"))


def test_eurlex_is_multi_label(tmp_path):
    law = {"header": "Decision", "recitals": "Whereas", "main_body": ["Article 1", ""]}
    for part in ("train", "dev", "test"):
        (tmp_path / part).mkdir()
        for number, concepts in enumerate((["4", "9"], [])):
            (tmp_path / part / f"{number}.json").write_text(json.dumps({**law, "concepts": concepts}))
    parts = eurlex(str(tmp_path), chunk_size=2)
    assert parts.facts["classes"] == ["4", "9"]
    assert parts.facts["multi_label"]
    assert [e.target.tolist() for e in parts.train[:]] == [[1, 1], [0, 0]]
    task = document_task(**parts.facts, model=functools.partial(models.deepsets, width=8))
    assert task.loss(parts.train[1], seed=0) > 0
    assert not parts.baselines
