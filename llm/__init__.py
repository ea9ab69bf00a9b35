"""Llama on PaddlePaddle: configuration, model, engine and serving."""
