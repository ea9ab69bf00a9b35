"""Integer weights: what computes with them, how they are found, how files hold them.

``linear`` is the layer and its rounding, ``files`` its tensors on disk, ``network`` puts layers in
and out. ``gptq`` and ``smoothing`` choose integers by text, which ``calibration`` leads through the
network; ``post_training`` does what quantize_generation.py asks for; ``qat`` trains with the
rounding in place. What is quantized how is said by ``llm.llama.quant_config``.
"""
