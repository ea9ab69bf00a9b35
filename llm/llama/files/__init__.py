"""Files of models and adapters: Hugging Face's layout, PaddleNLP's rank files, and the way between.

``weights`` loads and saves a network, ``peft`` an adapter. ``checkpoint`` sees a directory of any
layout as complete tensors, ``rank_layout`` says which part of which matrix lies where, ``target``
lays out the files to write, ``copying`` moves the numbers, ``comparing`` runs both sides.
"""
