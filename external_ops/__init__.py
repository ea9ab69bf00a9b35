"""Kernels behind one seam: each op has a reference, and fused forms where the device has them.

A leaf package: it imports paddle only. :mod:`external_ops.backend` chooses; callers hold the
:class:`~external_ops.backend.Ops` that it returns and never ask about devices themselves.
"""
