"""What all stages stand on: configuration, runs, checkpoints, atomic files, devices, processes,
seeds.
"""

__version__ = "0.1.0"
