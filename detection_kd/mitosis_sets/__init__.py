"""Annotated mitotic figures: one form for all published sets, their readers, and splits by case."""
