"""Networks of detection_kd: ResNet trunk, Deformable DETR."""
