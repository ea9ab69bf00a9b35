"""How good a model is: likelihoods of texts and answers, and comparison of generated answers.

``scorer`` gives log-likelihoods of any model, ``perplexity``, ``choices`` and ``squad`` are the
measures, ``tasks`` reads their data and runs them, ``models`` opens what is measured, ``report``
writes results, and ``lm_eval_backend`` is this suite's model inside lm-evaluation-harness.
"""
