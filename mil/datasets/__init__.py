"""Labels and bags of a cohort, in memory."""
