"""The models of long documents as pairs of an encoder of words and a head.

Arguments they share: ``words`` in the vocabulary, ``outputs`` and ``vectors`` (of the words, to be held; None: they are
learnt) follow from the data; ``width`` of all layers; ``depth``, linear layers of a word's network, 2 as published;
``dropout`` after the set. Before it there is none, so that sweeps may take many small chunks at once.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distset.blocks import MLP, SetTransformer
from distset.encoders import SSE, UMBC, ChunkEncoder, DeepSets, Features
from distset.tasks.set_models import in_blocks

__all__ = ["SlotBert", "WordNetwork", "deepsets", "sse", "umbc_bert", "umbc_set_transformer"]

BLOCK = 8192
"""Words that a sweep takes at once."""

Parts = tuple[ChunkEncoder, nn.Module]


class WordNetwork(nn.Module):
    """Words int64 ``(M, 1)`` to features ``(M, width)``: an embedding, a layer norm, linear layers with ReLU.

    Args:
        words: in the vocabulary.
        width: of embedding and layers.
        depth: linear layers; 0 for the embedding alone.
        vectors: ``(words, any width)``, held as the embedding (frozen); None: it is learnt, ``width`` wide.

    Raises:
        ValueError: for vectors that do not fit.
    """

    def __init__(self, words: int, width: int, *, depth: int = 2, vectors: Tensor | None = None) -> None:
        super().__init__()
        if vectors is None:
            self.embedding = nn.Embedding(words, width)
            # BERT's scale: the layer norm undoes it, but a step of the optimiser turns a small vector further.
            nn.init.normal_(self.embedding.weight, std=0.02)
        else:
            _check_vectors(vectors, words, width, depth)
            self.embedding = nn.Embedding.from_pretrained(vectors.clone())
        widths = [self.embedding.embedding_dim, *[width] * depth]
        layers: list[nn.Module] = [nn.LayerNorm(widths[0])]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, words: Tensor) -> Tensor:
        return self.layers(self.embedding(words.squeeze(-1)))


class SlotBert(nn.Module):
    """BERT without positions over a learned row and the slots ``(*, K, width)``; gives that row's output ``(*, width)``.

    Args:
        width: of a slot.
        slots: K.
        layers, heads, hidden: of the configuration that BERT is built from; ``hidden`` is 4 ``width`` if None.
        dropout: of attention and layers.
        weights: a local folder with ``config.json`` and weights, as `transformers` saves them; it replaces the
            configuration, and its width must be ``width``.

    Raises:
        ValueError: without the package transformers, for weights of another width or no folder.
    """

    def __init__(
        self,
        width: int,
        slots: int,
        *,
        layers: int = 1,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.1,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        transformers = _transformers()
        if weights is None:
            config = transformers.BertConfig(
                vocab_size=1, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=hidden or 4 * width, max_position_embeddings=slots + 1, type_vocab_size=1,
                hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            )  # fmt: skip
            self.bert = transformers.BertModel(config, add_pooling_layer=False)
        else:
            self.bert = _saved(transformers, weights, width, slots)
        self.first = nn.Parameter(0.02 * torch.randn(width))
        positions = self.bert.embeddings.position_embeddings.weight  # a set has none
        positions.requires_grad_(False).zero_()
        self.bert.embeddings.word_embeddings.requires_grad_(False)  # words come embedded, by way of the slots

    def forward(self, slots: Tensor) -> Tensor:
        batch = slots.reshape(-1, *slots.shape[-2:])
        rows = torch.cat([self.first.expand(len(batch), 1, -1), batch], 1)
        out = self.bert(inputs_embeds=rows).last_hidden_state[:, 0]
        return out.view(*slots.shape[:-2], -1)


def deepsets(
    words: int, outputs: int, *, width: int = 64, depth: int = 2, dropout: float = 0.0, vectors: Tensor | None = None
) -> Parts:
    """The mean of the words' features, and an MLP: a bag of words."""
    encoder = DeepSets(WordNetwork(words, width, depth=depth, vectors=vectors))
    return in_blocks(encoder, BLOCK), MLP(width, width, width, outputs, dropout=dropout)


def sse(
    words: int,
    outputs: int,
    *,
    width: int = 64,
    depth: int = 2,
    slots: int = 16,
    heads: int = 1,
    activation: str = "slot-sigmoid",
    dropout: float = 0.0,
    vectors: Tensor | None = None,
) -> Parts:
    """Slot set encoder, its slots averaged, and an MLP."""
    pool = SSE(width, slots, heads=heads, activation=activation, normalize=True, layer_norm=True)
    encoder = Features(WordNetwork(words, width, depth=depth, vectors=vectors), pool)
    return in_blocks(encoder, BLOCK), MLP(width, width, width, outputs, dropout=dropout)


def umbc_bert(
    words: int,
    outputs: int,
    *,
    width: int = 64,
    depth: int = 2,
    slots: int = 16,
    heads: int = 1,
    activation: str = "slot-sigmoid",
    bert_layers: int = 1,
    bert_heads: int = 4,
    dropout: float = 0.1,
    weights: str | None = None,
    vectors: Tensor | None = None,
) -> Parts:
    """UMBC, then BERT without positions over the slots (needs the package transformers)."""
    bert = SlotBert(width, slots, layers=bert_layers, heads=bert_heads, dropout=dropout, weights=weights)
    head = nn.Sequential(bert, nn.Dropout(dropout), nn.Linear(width, outputs))
    return _slots(words, width, depth, slots, heads, activation, vectors), head


def umbc_set_transformer(
    words: int,
    outputs: int,
    *,
    width: int = 64,
    depth: int = 2,
    slots: int = 16,
    heads: int = 1,
    activation: str = "slot-sigmoid",
    blocks: int = 1,
    dropout: float = 0.1,
    vectors: Tensor | None = None,
) -> Parts:
    """UMBC, then a Set Transformer over the slots."""
    return _slots(words, width, depth, slots, heads, activation, vectors), SetTransformer(
        width, outputs, blocks=blocks, dropout=dropout
    )


def _slots(
    words: int, width: int, depth: int, slots: int, heads: int, activation: str, vectors: Tensor | None
) -> ChunkEncoder:
    pool = UMBC(width, slots, heads=heads, activation=activation, layer_norm=True)
    return in_blocks(Features(WordNetwork(words, width, depth=depth, vectors=vectors), pool), BLOCK)


def _check_vectors(vectors: Tensor, words: int, width: int, depth: int) -> None:
    if vectors.dim() != 2 or len(vectors) != words:
        raise ValueError(f"vectors: got {tuple(vectors.shape)}, wanted one row for each of the {words} words")
    if depth == 0 and vectors.shape[1] != width:
        raise ValueError(
            f"vectors: got a width of {vectors.shape[1]} for depth=0 and width={width}, wanted the same width or depth=1"
        )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "model: BERT needs the package transformers, which is not installed; pip install distset[text], or take "
            "model=documents/umbc_set_transformer"
        ) from error
    return transformers


def _saved(transformers: Any, folder: str, width: int, slots: int) -> nn.Module:
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"weights: {folder} has no config.json, wanted a local folder that transformers saved a BERT in")
    config = transformers.BertConfig.from_pretrained(folder, local_files_only=True)
    if config.hidden_size != width or config.max_position_embeddings <= slots:
        raise ValueError(
            f"weights: {folder} is {config.hidden_size} wide for up to {config.max_position_embeddings} rows, wanted "
            f"width={width} and more rows than slots={slots}"
        )
    return transformers.BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
