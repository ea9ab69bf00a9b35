"""Files of models and adapters, and conversion from any layout to any.

``dtypes`` and ``safetensors`` are the ground; ``parts`` has several processes write one save,
``weights`` and ``slots`` fill and save networks, ``peft`` holds adapters. ``rank_layout`` and
``pdparams`` are PaddleNLP's files; ``checkpoint`` opens either kind. To convert, ``target`` lays
files out, ``copying`` moves numbers, ``conversion`` does both, ``comparing`` runs both sides.
"""
