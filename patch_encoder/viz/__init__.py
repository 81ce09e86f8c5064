"""Pictures of slides: tissue and tiles drawn on an overview, captions and scale bars."""
