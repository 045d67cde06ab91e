"""The documented import path `src.config`; the code lives in `lyra_emergence`."""
