"""The cohort that the quickstart renders or composes, without any download."""
