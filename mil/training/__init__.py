"""Training a slide classifier on one fold and applying it: engine, recipes, optimisers,
prediction.
"""
