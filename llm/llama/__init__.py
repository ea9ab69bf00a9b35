"""The network, how it is built, and its files, adapters and quantization."""
