"""Readers of long documents, and the vocabulary."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from distset.data.documents import Vocabulary, read_eurlex, read_movie_reviews, word_vectors


def reviews(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("movie_reviews/pos/cv950_1.txt", "a fine film , truly")
        file.writestr("movie_reviews/neg/cv003_2.txt", "no\nfilm")
        file.writestr("movie_reviews/README", "not a review")


def test_movie_reviews(tmp_path):
    reviews(tmp_path / "movie_reviews.zip")
    found, folds = read_movie_reviews(tmp_path)
    assert found.words == [["no", "film"], ["a", "fine", "film", ",", "truly"]]
    assert (found.labels, found.names, folds.tolist()) == ([[0], [1]], ["cv003_2", "cv950_1"], [0, 9])
    assert found.targets().tolist() == [[1, 0], [0, 1]]
    assert found.take([1]).names == ["cv950_1"]


def test_the_real_reviews(data_folder):
    found, folds = read_movie_reviews(data_folder / "movie_reviews")
    assert len(found.words) == 2000
    assert sum(label == [1] for label in found.labels) == 1000
    assert [(folds == fold).sum() for fold in range(10)] == [200] * 10
    assert (min(map(len, found.words)), max(map(len, found.words))) == (17, 2678)


def test_eurlex_is_read_with_its_sections_inverted(tmp_path):
    law = {"header": "Council Decision", "recitals": "Whereas,", "main_body": ["Article 1", "Article 2"]}
    for part, concepts in {"train": ["20", "7"], "dev": ["7"], "test": []}.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{part}.json").write_text(json.dumps({**law, "concepts": concepts}))
    parts = read_eurlex(tmp_path)
    assert parts["train"].words[0] == ["article", "1", "article", "2", "whereas", ",", "council", "decision"]
    assert read_eurlex(tmp_path, inverted=False)["dev"].words[0][:2] == ["council", "decision"]
    assert parts["train"].classes == ["20", "7"]
    assert [parts[part].labels for part in parts] == [[[0, 1]], [[1]], [[]]]


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"path: .* has no movie_reviews.zip"):
        read_movie_reviews(tmp_path)
    with pytest.raises(ValueError, match=r"path: .* has no train/\*.json"):
        read_eurlex(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.json").write_text(json.dumps({"header": ""}))
    with pytest.raises(ValueError, match=r"a.json has no concepts, main_body, recitals"):
        read_eurlex(tmp_path)


def test_broken_archives_of_reviews_are_named(tmp_path):
    archive = tmp_path / "movie_reviews.zip"
    archive.write_bytes(b"an error page")
    with pytest.raises(ValueError, match=r"path: .*movie_reviews.zip cannot be read as a zip file"):
        read_movie_reviews(tmp_path)
    reviews(archive)
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(b"fine film", b"FINE film"))
    with pytest.raises(ValueError, match=r"cannot be read as a zip file \(Bad CRC-32.*cv950"):
        read_movie_reviews(archive)


@pytest.mark.parametrize(("text", "said"), [
    ('{\n"header": ', r"a\.json, line 2: no JSON \(Expecting value\)"),
    ("[]", r"a\.json holds a list, wanted an object"),
    ('{"header": "", "recitals": null, "main_body": [], "concepts": []}', r"a\.json has recitals = null, wanted a text"),
    ('{"header": "", "recitals": "", "main_body": "x", "concepts": []}', r'main_body = "x", wanted a list of texts'),
    ('{"header": "", "recitals": "", "main_body": [], "concepts": [4]}', r"concepts = \[4\], wanted a list of texts"),
    (b"\xff", r"a\.json is not UTF-8"),
])  # fmt: skip
def test_broken_laws_are_named(tmp_path, text, said):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"^path: .*{said}"):
        read_eurlex(tmp_path)


def test_vocabulary_keeps_the_most_frequent_words():
    vocabulary = Vocabulary([["b", "a", "c"], ["b", "c", "c"]], size=2)
    assert vocabulary.words == ["<unknown>", "c", "b"]
    assert vocabulary.ids(["a", "b", "c"]).tolist() == [0, 2, 1]
    assert len(Vocabulary([["a", "b", "b"]], least=2)) == 2


def test_vectors_of_words_against_a_dense_decomposition():
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 12, n) for n in (5, 9, 14, 3, 8, 11)]  # of 13 words; 0 and 12 are in none
    found = word_vectors(documents, 13, 4)
    counts = np.stack([np.bincount(ids, minlength=13) for ids in documents])
    idf = np.log((1 + len(documents)) / (1 + (counts > 0).sum(0))) + 1
    tfidf = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    tfidf /= np.linalg.norm(tfidf, axis=1, keepdims=True)
    _, scale, right = np.linalg.svd(tfidf, full_matrices=False)
    wanted = right[:4].T * scale[:4]
    wanted[1:12] /= np.linalg.norm(wanted[1:12], axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-5)  # axes may be turned round
    assert (found[[0, 12]] == 0).all()
    assert (found == word_vectors(documents, 13, 4)).all()
    with pytest.raises(ValueError, match="vectors: got a width of 6 from 6 documents of 13 words, wanted 1 to 5"):
        word_vectors(documents, 13, 6)
