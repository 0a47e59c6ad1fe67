"""Sets on disk: the store, its writer, the readers of the field's formats, splits and synthetic sources."""

from distset.data.bag import Bag, Source
from distset.data.parquet_set import ParquetSet, SetRecord
from distset.data.schema import StoreInfo
from distset.data.splits import Split, check_split, make_splits
from distset.data.store import Store
from distset.data.synthetic import gaussian_bags
from distset.data.writer import StoreWriter, write_store

__all__ = [
    "Bag",
    "ParquetSet",
    "SetRecord",
    "Source",
    "Split",
    "Store",
    "StoreInfo",
    "StoreWriter",
    "check_split",
    "gaussian_bags",
    "make_splits",
    "write_store",
]
