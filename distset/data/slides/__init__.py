"""Whole-slide images: opened, looked over for tissue, cut into patches, or encoded as they are cut."""

from distset.data.slides.camelyon import camelyon16
from distset.data.slides.features import Features
from distset.data.slides.reading import Slide
from distset.data.slides.source import SlidePlan, Slides, slides
from distset.data.slides.tissue import tissue_mask

__all__ = ["Features", "Slide", "SlidePlan", "Slides", "camelyon16", "slides", "tissue_mask"]
