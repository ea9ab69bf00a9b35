"""Weights in 8 and 4 bits: rounding, GPTQ, training with rounding, and their files."""
