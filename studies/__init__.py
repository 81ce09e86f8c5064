"""Studies that stand above all stages and may name them: the ablation of D2VFM, measured costs of
encoders.
"""
