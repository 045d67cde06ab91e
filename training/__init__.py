"""Trains the model that ships with Lyra on journals written by a grammar, from a seed, with plain torch."""
