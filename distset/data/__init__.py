"""Sets on disk: the store, its writer, the readers of the field's formats, splits and synthetic sources."""

from distset.data.bag import Bag, Source
from distset.data.ingestion import ingest
from distset.data.labels import Labelled, label_table
from distset.data.parquet_set import ParquetSet, SetRecord
from distset.data.parts import ingest_parts
from distset.data.schema import StoreInfo
from distset.data.splits import Split, SplitPlan, check_split, make_splits
from distset.data.store import Store
from distset.data.synthetic import DigitBags, gaussian_bags
from distset.data.writer import StoreWriter, write_store

__all__ = [
    "Bag",
    "DigitBags",
    "Labelled",
    "ParquetSet",
    "SetRecord",
    "Source",
    "Split",
    "SplitPlan",
    "Store",
    "StoreInfo",
    "StoreWriter",
    "check_split",
    "gaussian_bags",
    "ingest",
    "ingest_parts",
    "label_table",
    "make_splits",
    "write_store",
]
