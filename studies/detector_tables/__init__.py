"""The table of detector recipes: a control without a network, and intervals by image."""
