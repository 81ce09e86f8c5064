"""Sets of annotated boxes: read from other layouts than COCO's, checked and described."""
