"""The bag classifier on stores: training runs, their results, prediction, explanation, evaluation."""
