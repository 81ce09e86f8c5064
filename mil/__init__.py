"""Everything between feature bags and a slide label: models, training, benchmark, ranking,
report.
"""
