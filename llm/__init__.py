"""Llama on PaddlePaddle: the network, what trains it, and what generates with it."""
