"""Multi-scale deformable attention: `ms_deform_attn.py` is the door, `reference.py` the
specification.
"""
