"""Several processes as one job; knows no model and no flags.

``layout`` and ``rules`` decide, before paddle is there, which degrees are possible; ``topology``
starts the job. ``tensor``, ``context``, ``pipeline`` and ``sharding`` are the axes, ``exchange``
is what they talk with; ``gradients``, ``updater`` and ``offload`` make an update, ``pieces`` whole
tensors for files. ``sentry`` and ``faults`` notice ranks that stop; ``gloo`` is NCCL on CPUs.
"""
