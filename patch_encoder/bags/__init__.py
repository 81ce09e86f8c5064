"""Feature bags on disk: writing, reading, checking, and assembling them from batches."""
