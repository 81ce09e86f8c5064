"""Trained slide classifiers at work on other slides: the folds of a benchmark as one ensemble."""
