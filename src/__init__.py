"""Marks the checkout's `src` as a package, so that an installed package called `src` cannot win over it."""
