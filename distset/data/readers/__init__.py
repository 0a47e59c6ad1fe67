"""Readers of the field's formats: each a function from a path to a `Source`."""

from distset.data.readers.csv_files import csv_bags
from distset.data.readers.files import FileSource
from distset.data.readers.h5 import clam, stamp, trident
from distset.data.readers.image_folders import patches
from distset.data.readers.lines import baskets
from distset.data.readers.mil import classic
from distset.data.readers.nuclei import colon
from distset.data.readers.tables import table
from distset.data.readers.tensors import arrays, pt_files

__all__ = [
    "FileSource",
    "arrays",
    "baskets",
    "clam",
    "classic",
    "colon",
    "csv_bags",
    "patches",
    "pt_files",
    "stamp",
    "table",
    "trident",
]
