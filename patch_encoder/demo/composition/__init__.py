"""Fields of real tissue, and the slides that are composed of them."""
