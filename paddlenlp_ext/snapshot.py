"""What a checkpoint holds beside the weights, and how a trainer gets it back.

Under the layout that wrote it a checkpoint continues bit for bit. Under another one weights,
moments, schedule and place in the data are the same numbers; only random generators, of which every
process has its own, start anew from the run's seed and the step.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

from llm.files import Work
from paddlenlp_ext import checkpoints, state
from paddlenlp_ext.logs import logger, quiet_import
from paddlenlp_ext.order import order_fingerprint

with quiet_import():
    import paddle

_TRAINER_STATE = "trainer_state.json"  # PaddleNLP's name; its loop reads this file on resume
_SCHEDULER_STATE = "scheduler_state.json"
_METER_STATE = "meter_state.json"
_SCALER_STATE = "scaler.pdparams"
_LAYOUT = "layout"


def fill(trainer: Any, directory: Path, work: Work) -> None:
    """Write a checkpoint of a :class:`~paddlenlp_ext.trainer.LanguageModelTrainer`.

    All processes call this; each writes its share.

    Args:
        trainer: after an update.
        directory: empty, the same for all processes.
        work: does what touches the disk, now or later; it is given copies.
    """
    trainer.save_weights(directory, work)
    state.save_optimizer(trainer.optimizer, directory, work)
    randomness = state.random_state_file(directory, trainer.topology)
    work.do(partial(checkpoints.write_json, randomness, state.random_state()))
    if not trainer.main:
        return
    consumed = trainer.consumed(trainer.state.global_step)
    loader = {
        "consumed_samples": consumed,
        "order": order_fingerprint(trainer.train_dataset, consumed),
        _LAYOUT: trainer.topology.layout.describe(),
        **trainer.task.data_state,
    }
    for name, content in (
        (checkpoints.LOADER_STATE, loader),
        (_SCHEDULER_STATE, trainer.lr_scheduler.state_dict()),
        (_METER_STATE, trainer.meter.state()),
    ):
        work.do(partial(checkpoints.write_json, directory / name, copy.deepcopy(content)))
    progress = copy.deepcopy(trainer.state)
    work.do(lambda: progress.save_to_json(str(directory / _TRAINER_STATE)))
    if trainer.do_grad_scaling:
        scale = {key: value.numpy() for key, value in trainer.scaler.state_dict().items()}
        work.do(partial(paddle.save, scale, str(directory / _SCALER_STATE)))


def restore(trainer: Any, directory: Path) -> None:
    """Give a trainer the optimizer, schedule and figures of a checkpoint.

    Raises:
        UserError: a damaged file, or one of another model.
    """
    state.load_optimizer(trainer.optimizer, directory)
    trainer.lr_scheduler.set_state_dict(checkpoints.read_json(directory / _SCHEDULER_STATE))
    trainer.meter.restore(checkpoints.read_json(directory / _METER_STATE))
    if trainer.do_grad_scaling:
        trainer.scaler.load_state_dict(
            paddle.load(str(directory / _SCALER_STATE), return_numpy=True)
        )


def restore_randomness(trainer: Any, directory: Path) -> None:
    """Set the random generators to those of a checkpoint, or anew under another layout."""
    file = state.random_state_file(directory, trainer.topology)
    loader = checkpoints.read_json(directory / checkpoints.LOADER_STATE)
    now = trainer.topology.layout.describe()
    before = loader.get(_LAYOUT, now)
    if before == now:
        state.restore_random_state(checkpoints.read_json(file))
        return
    logger.info("the checkpoint is of %s, this run is %s: converted", before, now)
    state.start_random_state(trainer.run.seed, trainer.state.global_step, trainer.topology)
