"""What a run says of itself: scores with intervals, tables, plots, heat-maps."""

from distset.report.elements import Extremes, contact_sheet, pick_elements
from distset.report.heatmaps import GeoJson, Heatmap, load_image
from distset.report.plots import plot_confusion, plot_curves, plot_roc, plot_spread
from distset.report.scores import Interval, bag_scores, choose_threshold, predicted_classes
from distset.report.tables import ElementTable, prediction_table, write_json, write_table

__all__ = [
    "ElementTable",
    "Extremes",
    "GeoJson",
    "Heatmap",
    "Interval",
    "bag_scores",
    "choose_threshold",
    "contact_sheet",
    "load_image",
    "pick_elements",
    "plot_confusion",
    "plot_curves",
    "plot_roc",
    "plot_spread",
    "predicted_classes",
    "prediction_table",
    "write_json",
    "write_table",
]
