"""How good a model is: likelihoods of texts and answers, and comparison of generated answers.

``scorer`` gives log-likelihoods of any model; ``perplexity``, ``choices``, ``exams``, ``squad``,
``cmrc``, ``gsm8k`` and ``needle`` are the measures; ``tasks`` and ``asking`` read their data,
``measuring`` runs them; ``report`` and ``parts`` keep and write results; and ``lm_eval_backend`` is
this suite's model inside lm-evaluation-harness.
"""
