"""Choosing k of n: the k-subset distribution, exact sampling, sums over chunks, and the approximations in use."""

from distset.subsets.chunked import ChunkedKSubset, LogitTable
from distset.subsets.counts import CountPmf
from distset.subsets.distribution import KSubset, kl_divergence
from distset.subsets.gumbel import gumbel_top_k, relaxed_top_k

__all__ = ["ChunkedKSubset", "CountPmf", "KSubset", "LogitTable", "gumbel_top_k", "kl_divergence", "relaxed_top_k"]
