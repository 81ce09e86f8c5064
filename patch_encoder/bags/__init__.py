"""Feature bags on disk: finding, opening, checking and writing them."""
