"""Learning to explain: the true gradient, documents of different length, a judge as a black box, BeerAdvocate's files."""

import gzip
import itertools
import json
import zipfile

import numpy as np
import pytest
import torch
from small_subsets import subsets
from torch import Tensor

from distset.data.beer import read_annotations, read_ratings
from distset.expect import LeaveOneOut, ScoreFunction, Simple
from distset.noise import TwoPoint
from distset.perturb_and_map import PerturbAndMap
from distset.problems.reviews import beer_reviews, movie_reviews
from distset.sets import InMemory
from distset.solve import Identity
from distset.tasks.explain_words import Explainer, ExplainTask, LinearJudge, Review, explain_judge_task
from distset.train import Example


def document(*words: int, label: float = 0) -> Example:
    return Example(InMemory(torch.tensor(words).unsqueeze(-1), name=f"of {len(words)}"), Review(label))


DOCUMENTS = [document(1, 2, 3, 4, 5, label=0), document(6, 1, 6, label=1)]


def task_of(judge: bool, grad=None) -> ExplainTask:
    torch.manual_seed(0)
    model = Explainer(8, 0 if judge else 2, width=4).double()
    box = LinearJudge(torch.randn(8, 2), torch.zeros(2)) if judge else None
    return ExplainTask(model, list("_abcdefg"), ["no", "yes"], 2, judge=box, grad=grad, num_samples=5)


def enumerated(task: ExplainTask, example: Example) -> Tensor:
    """The loss of one document by going through all pairs of its words."""
    words = example.set.elements.T
    logits = task.model.select(words, torch.ones_like(words, dtype=torch.bool))[0]
    n = words.shape[-1]
    z = subsets(n, 2)
    if task.judge is None:
        log_odds = task.model.read(words, z.unsqueeze(1), 2)[:, 0].log_softmax(-1)
        wanted = torch.eye(2).double()[int(example.target.value)]
    else:
        log_odds = torch.from_numpy(task.judge(words.numpy(), z.unsqueeze(1).numpy()))[:, 0].log()
        wanted = torch.eye(2).double()[int(task.judge(words.numpy(), np.ones((1, 1, n)))[0, 0].argmax())]
    return ((z @ logits).softmax(0) * -(wanted * log_odds).sum(-1)).sum()


@pytest.mark.parametrize("judge", [False, True])
@pytest.mark.parametrize("grad", [None, ScoreFunction(LeaveOneOut())], ids=repr)
def test_the_gradient_is_the_enumerated_one(judge, grad) -> None:
    task = task_of(judge, grad)
    truth = torch.stack([enumerated(task, example) for example in DOCUMENTS]).mean()
    parameters = list(task.model.parameters())
    wanted = torch.autograd.grad(truth, parameters)
    runs = 60
    found = [torch.autograd.grad(task.batch_loss(DOCUMENTS, seed=seed), parameters) for seed in range(runs)]
    for want, got in zip(wanted, zip(*found)):
        draws = torch.stack(got)
        assert ((draws.mean(0) - want).abs() / (draws.std(0) / runs**0.5 + 1e-6)).max() < 5


def test_padding_changes_nothing() -> None:
    """A short document has the same logits in a batch with a long one."""
    model = Explainer(8, 2, width=4).double()
    words = torch.tensor([[6, 1, 6, 0, 0], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    alone = model.select(words[:1, :3], mask[:1, :3])
    together = model.select(words, mask)
    torch.testing.assert_close(together[0, :3], alone[0])
    assert (together[0, 3:] == -torch.inf).all()


def test_a_judge_is_explained_by_the_words_that_decide() -> None:
    """Word 7 alone says yes: the selector learns to keep it, from a black box."""
    weights = torch.zeros(8, 2)
    weights[7, 1] = 8.0
    generator = torch.Generator().manual_seed(0)
    examples = []
    for number in range(32):
        words = torch.randint(1, 7, (6,), generator=generator)
        if number % 2:
            words[number % 6] = 7
        examples.append(document(*words.tolist(), label=number % 2))
    facts = {
        "words": list("_abcdefg"),
        "classes": ["no", "yes"],
        "judge": {"weights": weights, "bias": torch.tensor([1.0, 0])},
    }
    torch.manual_seed(0)
    task = explain_judge_task(**facts, k=1, width=8)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=2e-2)
    for seed in range(60):
        optimizer.zero_grad()
        task.batch_loss(examples, seed=seed).backward()
        optimizer.step()
    with torch.no_grad():
        kept = [task.predict(example.set)[4:] for example in examples[1::2]]
    found = [int(example.set.elements[int(k.argmax()), 0]) for k, example in zip(kept, examples[1::2])]
    assert np.mean(np.array(found) == 7) > 0.9


def test_a_short_document_is_kept_whole() -> None:
    task = task_of(judge=False)
    short = document(3, label=1)
    assert task.predict(short.set).tolist()[2:] == [1.0]
    assert task.batch_loss([short, DOCUMENTS[0]], seed=0).isfinite()


def test_precision_is_the_share_of_kept_words() -> None:
    task = task_of(judge=False)
    short, long = document(3, label=1), DOCUMENTS[0]
    with torch.no_grad():
        outputs = [task.predict(example.set) for example in (short, long)]
    kept = outputs[1][2:].bool()
    half = torch.zeros(5, dtype=torch.bool)
    half[kept.nonzero()[0]] = True
    for output, marked, wanted in (
        (outputs[0], torch.tensor([True]), 1.0),
        (outputs[0], torch.tensor([False]), 0.0),
        (outputs[1], half, 0.5),
    ):
        assert task.metrics([output], [Review(1, marked)])["precision"] == wanted


def test_identity_sees_each_document_alone() -> None:
    """Without noise: the gradient of a padded batch, one document shorter than k, is the mean of the documents' own."""
    documents = [*DOCUMENTS, document(3, label=1)]
    task = task_of(judge=False, grad=PerturbAndMap(Identity("std"), noise=TwoPoint(0.0)))
    parameters = list(task.model.parameters())
    together = torch.autograd.grad(task.batch_loss(documents, seed=0), parameters)
    alone = [torch.autograd.grad(task.batch_loss([one], seed=0), parameters) for one in documents]
    for got, wanted in zip(together, zip(*alone)):
        torch.testing.assert_close(got, torch.stack(wanted).mean(0), rtol=1e-9, atol=1e-12)
    assert (together[0] != 0).any()


def test_what_cannot_be_explained() -> None:
    with pytest.raises(ValueError, match="judge: got None for a model without a reader"):
        ExplainTask(Explainer(8, 0), ["a"] * 8, ["no", "yes"])
    with pytest.raises(ValueError, match="f: its values carry no gradient in z"):
        task_of(judge=True, grad=Simple()).batch_loss(DOCUMENTS, seed=0)
    with pytest.raises(ValueError, match="k: got 0"):
        ExplainTask(Explainer(8, 2), ["a"] * 8, ["no", "yes"], 0)


def write_beer(folder) -> None:
    lines = [f"{0.1 * i:.1f} {0.2 * (i % 5):.1f} 0.5 0.5 0.5\tsmells of hops , looks dark" for i in range(10)]
    for part in ("train", "heldout"):
        with gzip.open(folder / f"reviews.aspect1.{part}.txt.gz", "wt") as file:
            file.write("\n".join(lines))
    marked = {
        "x": ["smells", "of", "hops", ",", "looks", "dark"],
        "y": [0.1, 0.9, 0.5, 0.5, 0.5],
        "0": [[4, 6]],
        "1": [[0, 3]],
    }
    unmarked = {**marked, "1": []}
    (folder / "annotations.json").write_text("\n".join(map(json.dumps, (marked, unmarked))))


def test_beer_reviews(tmp_path) -> None:
    write_beer(tmp_path)
    ratings = read_ratings(tmp_path / "reviews.aspect1.train.txt.gz", "smell")
    assert [review.rating for review in ratings[:3]] == [0.0, 0.2, 0.4]
    (annotated,) = read_annotations(tmp_path / "annotations.json", "smell")
    assert annotated.rating == 0.9
    assert annotated.marked.tolist() == [True] * 3 + [False] * 3
    parts = beer_reviews(str(tmp_path))
    assert parts.facts["classes"] is None
    assert parts.baselines["random_words_precision"] == 0.5
    torch.manual_seed(0)
    task = ExplainTask(Explainer(len(parts.facts["words"]), 1), parts.facts["words"], None, 3, num_samples=6)
    task.batch_loss(parts.train[:4], seed=0).backward()
    with torch.no_grad():
        figures = task.metrics([task.predict(e.set) for e in parts.test], [e.target for e in parts.test])
    assert set(figures) == {"loss", "precision"}
    task.draw(tmp_path / "plots", parts)
    assert "<mark>" in (tmp_path / "plots" / "kept_words.html").read_text()


def test_bad_beer(tmp_path) -> None:
    write_beer(tmp_path)
    for arguments, message in (
        ({"aspect": "foam"}, "aspect: got 'foam', wanted one of look"),
        ({"aspect": "taste"}, "path: there is no file .*aspect3.train.txt"),
        ({"train": 0}, "train: got 0, wanted at least 1"),
        ({"train": -1}, "train: got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            beer_reviews(str(tmp_path), **arguments)
    for part in ("train", "heldout"):
        (tmp_path / f"reviews.aspect4.{part}.txt").write_text("0.1 0.2 0.3 0.4 0.5\tfine")
    (tmp_path / "annotations.json").write_text(json.dumps({"x": ["fine"], "y": [0.5] * 5, "4": []}))
    with pytest.raises(ValueError, match=r"aspect: .* has no annotated review with words marked for 'overall'"):
        beer_reviews(str(tmp_path), aspect="overall")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no tab here", "path: line 2 of .*, wanted ratings, a tab and words"),
        ("0.1 0.2", "path: line 2 of .* has no words after its ratings"),
        ("0.1\tonly the look", "path: line 2 of .*, wanted ratings, a tab and words"),
        ("0.1 nan\tfine", r"path: line 2 of .* rates the smell nan, wanted a rating in \[0, 1\]"),
        ("0.1 4.5\tfine", "path: line 2 of .* rates the smell 4.5"),
    ],
)
def test_bad_ratings(line: str, message: str, tmp_path) -> None:
    (tmp_path / "bad.txt").write_text(f"0.1 0.2\tfine\n{line}")
    with pytest.raises(ValueError, match=message):
        read_ratings(tmp_path / "bad.txt", "smell")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"x": ["fine"', "path: line 1 of .*, wanted JSON"),
        ("[1, 2]", "path: line 1 of .* has no 1, x, y, wanted an annotation"),
        ('{"x": ["fine"], "y": [0.1], "1": [[0, 1]]}', r"path: line 1 of .* has y = \[0.1\] and ranges .* wanted 5 ratings"),
        ('{"x": ["fine"], "y": [0.1, 0.5], "1": [0, 1]}', r"path: line 1 of .* ranges \[0, 1\] for smell, wanted .* pairs"),
        ('{"x": ["fine"], "y": [0.1, NaN], "1": [[0, 1]]}', "path: line 1 of .* rates the smell nan"),
    ],
)
def test_bad_annotations(line: str, message: str, tmp_path) -> None:
    (tmp_path / "bad.json").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path / "bad.json", "smell")


def test_ratings_that_cannot_be_unpacked(tmp_path) -> None:
    write_beer(tmp_path)
    packed = (tmp_path / "reviews.aspect1.train.txt.gz").read_bytes()
    for broken in (packed[:-12], b"no gzip"):
        (tmp_path / "bad.txt.gz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"path: .*bad.txt.gz cannot be read as text"):
            read_ratings(tmp_path / "bad.txt.gz", "smell")


def write_movies(path, folds=range(10), text: str = "a film") -> str:
    with zipfile.ZipFile(path, "w") as file:
        for kind, fold, number in itertools.product(("neg", "pos"), folds, range(3)):
            file.writestr(f"movie_reviews/{kind}/cv{fold}{number:02}_1.txt", text if number else kind)
    return str(path)


@pytest.mark.parametrize(("limit", "counts"), [(None, [48, 6, 6]), (30, [30, 6, 6]), (5, [5, 5, 5]), (100, [48, 6, 6])])
def test_as_many_movie_reviews_as_asked_for(limit, counts, tmp_path) -> None:
    parts = movie_reviews(write_movies(tmp_path / "movies.zip"), limit=limit)
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == counts
    labels = [example.target.value for example in parts.train]
    assert abs(sum(labels) - counts[0] / 2) <= 1


def test_an_empty_review_is_one_unknown_word(tmp_path) -> None:
    parts = movie_reviews(write_movies(tmp_path / "movies.zip", text=" "))
    assert {tuple(example.set.elements.flatten().tolist()) for example in parts.test} >= {(0,)}
    assert parts.baselines["judge_accuracy"] > 0.5


def test_bad_movie_reviews(tmp_path) -> None:
    whole, one = write_movies(tmp_path / "movies.zip"), write_movies(tmp_path / "one.zip", range(1, 10))
    for path, arguments, message in (
        (whole, {"limit": 0}, "limit: got 0, wanted at least 1"),
        (whole, {"limit": -5}, "limit: got -5"),
        (whole, {"limit": 1}, "examples: all 1 training reviews are of one class"),
        (whole, {"fold": 10}, "fold: got 10"),
        (one, {"fold": 0}, "path: .*one.zip has no reviews to test on with fold 0"),
        (one, {"fold": 9}, "path: .*one.zip has no reviews to validate on with fold 9"),
    ):
        with pytest.raises(ValueError, match=message):
            movie_reviews(path, **arguments)
