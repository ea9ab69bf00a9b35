"""Training: what a run checks, computes and keeps; the loop itself is in :mod:`paddlenlp_ext`.

* before paddle: ``checks``, ``pretrain_plan``, ``finetune_plan``, ``schedules``
* what is computed: ``objectives``, ``preference``; put together in ``finetune``, ``processes``
* what the trainer is given: ``task``; what gradients become: ``llm.parallel.updater``
* what is kept: ``checkpoints`` (directories), ``state`` (contents), ``saver`` (who writes when)
* what is said: ``figures``, ``logs``
"""
