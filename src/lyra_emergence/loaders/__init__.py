"""Loaders that Lyra does not own, and the arguments that their callers know: the same ladder, one call per rung."""
