"""Data of detection_kd: COCO-format detection sets, their transforms and metrics."""
