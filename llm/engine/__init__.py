"""Generation with a paged cache, over a dygraph network or an exported program alike.

``opening`` is the door to a trained model. ``request`` is what callers make and get, ``engine``
drives, ``scheduler`` decides what runs in a step, ``sequence`` is a running request, ``blocks``
owns the cache, ``batch`` lays a step out, ``runners`` execute it, ``sampler`` picks tokens.
``texts`` ends answers at stop strings; ``verify`` and ``replay`` compare an export with its
network.
"""
