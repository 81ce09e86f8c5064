"""Work in supervised processes, of this machine or of a Ray cluster."""
