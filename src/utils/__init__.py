"""The documented import path `src.utils`; the code lives in `lyra_emergence`."""
