"""Deformable attention over a sparse bag: `sparse_deform_attn.py` is the door, `reference.py` the
specification.
"""
