"""The table of filters of weak labels: rows, scores on test fields, and intervals by slide."""
