"""What a layout costs before it runs: memory of each rank, communication and time of a step.

``workload`` says what a rank computes and on what; ``memory`` and ``step`` are the formulas, which
docs/parallel.md explains; ``prediction`` puts them together and searches, ``report`` prints.
``predict`` is what the trainer compares with the measured peak; ``python -m llm.planner`` is the
same on the command line, with layouts that fit. Nothing here imports paddle.
"""

from llm.planner.prediction import Prediction, needs_offload, predict
from llm.planner.workload import Workload

__all__ = ["Prediction", "Workload", "needs_offload", "predict"]
