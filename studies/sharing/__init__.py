"""A trained model as a folder that others can take: weights, description, card, and what the
licences of the encoders behind it permit.
"""
