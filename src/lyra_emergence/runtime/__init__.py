"""How placed blocks run: copies on devices, hand-over between them, quantized projections."""
