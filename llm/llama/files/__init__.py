"""Checkpoints from one layout to another: Hugging Face's files and PaddleNLP's rank files.

``geometry`` says which part of which matrix lies where, ``checkpoints`` finds it, ``planning`` lays
out the files to write, ``copying`` moves the numbers, ``comparing`` runs both sides. Only the last
needs paddle.
"""
