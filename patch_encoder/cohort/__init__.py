"""A cohort of slides: labels, failures, shards, disk space, and a summary of what is there."""
