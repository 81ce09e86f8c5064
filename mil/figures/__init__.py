"""Figures of slide classifiers: curves, figures by task, example slides, report figures."""
