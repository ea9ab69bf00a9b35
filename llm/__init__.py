"""Llama on PaddlePaddle: the network, what trains it, and what generates with it."""

__version__ = "0.1.0"
