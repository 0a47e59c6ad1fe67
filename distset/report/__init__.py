"""What a run says of itself: scores with intervals, tables, plots, heat-maps."""

from distset.report.plots import plot_confusion, plot_curves, plot_folds, plot_roc
from distset.report.scores import Interval, bag_scores, choose_threshold, predicted_classes
from distset.report.tables import ElementTable, prediction_table, write_json, write_table

__all__ = [
    "ElementTable",
    "Interval",
    "bag_scores",
    "choose_threshold",
    "plot_confusion",
    "plot_curves",
    "plot_folds",
    "plot_roc",
    "predicted_classes",
    "prediction_table",
    "write_json",
    "write_table",
]
