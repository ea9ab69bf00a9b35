"""The network, and all that is done to one.

``config``, ``quant_config`` and ``placement`` describe it; ``modeling`` is it, with ``rope`` and
``layers``; ``seams`` says where others reach in. ``files`` reads and writes it, ``adapters`` and
``quantization`` change it. ``build`` puts it together, ``recompute`` and ``pipeline`` run it in
training, ``fused`` and ``cache`` in generation; ``export`` and ``manifest`` make a program of it,
``saving`` a complete directory.
"""
