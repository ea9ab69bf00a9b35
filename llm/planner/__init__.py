"""What a layout costs before it runs: memory of each rank, communication and time of a step.

``predict`` is what the trainer prints at its start and compares with the measured peak;
``python -m llm.planner`` is the same on the command line, with layouts that fit. The formulas
and what they assume are in docs/parallel.md. Nothing here imports paddle.
"""

from llm.planner.prediction import Prediction, needs_offload, predict
from llm.planner.workload import Workload

__all__ = ["Prediction", "Workload", "needs_offload", "predict"]
