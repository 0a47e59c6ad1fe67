"""A search over settings: spaces in plain configuration, trials as folders, tables and plots of what came out."""

from distset.search.plan import ASHA, PBT, Search, read_search
from distset.search.space import Choice, Range, apply, draw, read_space

__all__ = ["ASHA", "PBT", "Choice", "Range", "Search", "apply", "draw", "read_search", "read_space"]
