"""How well an encoder's features tell labelled tiles apart: k-NN, linear and fine-tuning probes."""
