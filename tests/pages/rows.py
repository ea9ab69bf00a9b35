"""What becomes of each command of the pages: a row says how it is run, or why it is only read.

A row belongs to the commands of its page that begin with its key; of several keys the longest
counts. Commands run in the order of :data:`PAGES` in one directory, so that later ones see what
earlier ones wrote, and as they stand there but for what a row changes.
"""

from dataclasses import dataclass, field

from tests.page_commands import Shown

# A newcomer's order: what a page takes for granted was made by one before it.
PAGES = (
    "README.md",
    "README_zh.md",
    "CONTRIBUTING.md",
    "docs/data.md",
    "docs/pretrain.md",
    "docs/export_and_infer.md",
    "docs/serving.md",
    "docs/batch.md",
    "docs/operate.md",
    "docs/instruct_data.md",
    "docs/finetune.md",
    "docs/adapters.md",
    "docs/preference.md",
    "docs/evaluate.md",
    "docs/quantization.md",
    "docs/convert.md",
    "docs/parallel.md",
    "docs/checkpoints.md",
    "docs/migrate.md",
    "docs/ops.md",
    "docs/devices.md",
)
# What a page says that the reader has.
GIVEN = {
    "docs/operate.md": {
        "keys.yaml": "- {name: alice, key: sk-alice-0123456789, requests_per_minute: 60}\n"
    },
    "docs/evaluate.md": {"outputs/predictions.json": '{"dev-001": "four times a day"}'},
}


@dataclass(frozen=True)
class Run:
    """A command that is run.

    Args:
        flags: given these values instead of the page's; ``--flag value ...``.
        words: words of the command and what stands in their place.
        says: what its output has to hold, a regular expression.
        status: its exit status.
        quick: `make test` runs it too.
        behind: it serves while the commands behind it on its page run.
        needs: a file or directory below the repository, without which it is skipped.
    """

    flags: str = ""
    words: dict[str, str] = field(default_factory=dict)
    says: str = ""
    status: int = 0
    quick: bool = False
    behind: bool = False
    needs: str = ""


@dataclass(frozen=True)
class Read:
    """A command that is not run, and why; its own parser reads it all the same."""

    reason: str


INSTALLS = Read("makes or changes an environment")
SUITE = Read("a part of the suite itself: `make test` runs it")
GPUS = Read("needs GPUs of one machine or of several")
SHORT = "--max_steps 4 --eval_steps 2 --save_steps 2"
TUNED = Run("--num_train_epochs 0.2 --warmup_steps 1 --logging_steps 4")

ROWS: dict[str, dict[str, Run | Read]] = {
    "README.md": {
        "make demo": Run(
            words={"make demo": "python demo.py --output_dir outputs/demo --max_steps 6"},
            says="Done in",
        ),
        "make serve": Read("serves until it is stopped, on fixed ports; server.py below is run"),
        "make chat": Read("fetches a model and serves it; tests/e2e/test_make_chat.py asks it"),
        "make test": SUITE,
        "make setup": INSTALLS,
        "source .venv/bin/activate": Read("every command here is run in that environment"),
        "python -m data.prepare": Run("--workers 1", quick=True),
        "python run_pretrain.py": Run(SHORT + " --max_seq_length 64", quick=True),
        "python -m paddle.distributed.launch": Run(SHORT),
        "python predict_generation.py": Run("--max_length 8", quick=True),
        "python predict_generation.py --model_name_or_path outputs/first/model "
        '--prompt "The token store" --max_length 32 --dtype bfloat16': Run(
            needs="external_ops/llama_paddle_ops/build_info.json", quick=True
        ),
        "python export_generation_model.py": Run(says="alone and together", quick=True),
        "python infer_generation.py": Run(),
        "python server.py": Run(behind=True),
        "curl": Run(says="."),
        "python finetune_generation.py": Run("--num_train_epochs 0.2", quick=True),
        "python merge_lora.py": Run(quick=True),
        "python evaluate_generation.py": Run("--limit 4", quick=True),
        "python evaluate_generation.py --model_name_or_path outputs/first/model --task": Run(),
        "make lmeval": INSTALLS,
        ".venv-lmeval/bin/lm_eval": Run(says="local_ceval", needs=".venv-lmeval/bin/lm_eval"),
        "python quantize_generation.py": Run(quick=True),
        "python convert_checkpoint.py": Run(quick=True),
        "python -m llm.planner": Run(says="layouts that fit", quick=True),
        "make ops": INSTALLS,
        "python -m llama_paddle_ops": Run(
            says="all operators work", needs="external_ops/llama_paddle_ops/build_info.json"
        ),
        "make gpu-first": GPUS,
    },
    "README_zh.md": {"": Read("the commands of README.md, which a test compares")},
    "CONTRIBUTING.md": {
        "make setup": INSTALLS,
        "source .venv/bin/activate": Read("every command here is run in that environment"),
        "pre-commit install": Read("changes the checkout's git hooks"),
    },
    "docs/data.md": {
        "python -m data.prepare": Run(quick=True),
        "python -m data.merge": Run(says="read back and equal", quick=True),
        "python run_pretrain.py": Run(SHORT),
        "from data.corpus.token_store": Run(quick=True),
        "from data.corpus.pretrain_dataset": Run(),
        "from data.tokenization.batch": Run(),
    },
    "docs/pretrain.md": {
        "python run_pretrain.py": Run(SHORT),
        "python -u -m paddle.distributed.launch": Run(
            words={"./data": "outputs/first/store", "./output": "outputs/classic"}
        ),
    },
    "docs/export_and_infer.md": {
        "echo": Run(),
        "python predict_generation.py": Run(),
        "python export_generation_model.py": Run(words={"first/inference/": "first/inference2/"}),
        "python infer_generation.py": Run(),
        "from llm.llama.build": Run(needs="external_ops/llama_paddle_ops/build_info.json"),
        "from llm.config.generation": Run(says="length|stop"),
        "from llm.engine.offline": Run(says="length"),
    },
    "docs/serving.md": {
        "python server.py": Run(behind=True),
        "python -m paddle.distributed.launch --gpus": GPUS,
        "python -m paddle.distributed.launch --nproc_per_node": Read(
            "its ports are those of the first one; tests/distributed/test_team.py runs it"
        ),
        "curl http://127.0.0.1:8011/v1/chat/completions -H 'Content-Type: application/json' -d "
        '\'{"messages": [{"role": "user", "content": "The weather': Run(says='"tool_calls"'),
        "curl": Run(says="data: "),
        "from openai import": Read("needs a package in an environment of the reader's own"),
        "python -m llm.serving.page.ui": Run(behind=True),
    },
    "docs/batch.md": {
        "python -m llm.serving.batch --input_file outputs/asked.jsonl --output_file "
        "outputs/answered.jsonl --model_dir": Run(),
        "python -m llm.serving.batch": Run(),
        "echo": Run(),
        "python server.py": Run(behind=True),
    },
    "docs/operate.md": {
        "python server.py": Run(behind=True),
        "curl": Run(says="choices"),
        "curl http://127.0.0.1:8012/metrics": Run(says="vllm:request_success_total"),
        "curl http://127.0.0.1:8012/v1": Read(
            "programs take no adapters; tests/unit/serving/test_adapters_at_run_time.py has some"
        ),
    },
    "docs/instruct_data.md": {
        "from data.conversations.instruct": Run(),
        "python -m data.conversations": Run(),
        "python -m data.prepare": Run(),
    },
    "docs/finetune.md": {
        "python -u -m paddle.distributed.launch": TUNED,
        "python finetune_generation.py": TUNED,
        "python predict_generation.py": Run(),
        "python export_generation_model.py": Run(says="alone and together"),
        "python evaluate_generation.py": Run("--limit 4 --chat_template plain"),
    },
    "docs/adapters.md": {
        "python": Run(),
        "from llm.llama.build": Run(),
        "from llm.config": Run(says="boats"),
    },
    "docs/preference.md": {"python finetune_generation.py": Run(says="rewards_accuracy 0.0000")},
    "docs/evaluate.md": {
        "python evaluate_generation.py": Run(),
        "from llm.evaluation": Run(),
        "make lmeval": INSTALLS,
        ".venv-lmeval/bin/lm_eval": Run(says=r"local_\w+", needs=".venv-lmeval/bin/lm_eval"),
    },
    "docs/quantization.md": {
        "python quantize_generation.py --model_name_or_path outputs/demo": Run(
            "--calibration_samples 4 --eval_limit 2"
        ),
        "python quantize_generation.py": Run(),
        "python finetune_generation.py": Run("--num_train_epochs 0.2"),
    },
    "docs/convert.md": {
        "python convert_checkpoint.py": Run(),
        "python predict_generation.py": Run(),
        "python -m paddle.distributed.launch": Run(),
    },
    "docs/parallel.md": {
        "python -u -m paddle.distributed.launch --nproc_per_node": Run(SHORT),
        "python -u -m paddle.distributed.launch": GPUS,
        "python -m llm.planner": Run(says="layouts that fit"),
    },
    "docs/checkpoints.md": {"python -m pytest": SUITE},
    "docs/migrate.md": {
        "python predict_generation.py": Run("--max_length 8", says=""),
        "python export_generation_model.py": Run(),
        "python infer_generation.py": Run("--max_length 8"),
    },
    "docs/ops.md": {
        "make ops": INSTALLS,
        "pip": INSTALLS,
        "cd external_ops": INSTALLS,
        "python -m llama_paddle_ops": Run(
            says="all operators work", needs="external_ops/llama_paddle_ops/build_info.json"
        ),
    },
    "docs/devices.md": {
        "make setup": INSTALLS,
        "make rehearse": Run(
            words={
                "make rehearse RECIPE=configs/pretrain_llama2_7b_8gpu.yaml": "python -m "
                "tests.device.rehearse configs/finetune_llama3.2_1b_gpu.yaml"
            },
            says="bit for bit",
            needs="tests/device/build/plugin/librehearsal.so",
        ),
        "make gpu-first": GPUS,
        "python -m llama_paddle_ops": Run(
            says="all operators work", needs="external_ops/llama_paddle_ops/build_info.json"
        ),
        "python predict_generation.py": Read("needs an NPU of Ascend"),
        "python -m paddle.distributed.launch": Read("needs NPUs of Ascend"),
        "python -m tests.device.run": Run(needs="tests/device/build/plugin/librehearsal.so"),
        "def test_two_ranks": Read("a sketch of a test; the tests of tests/device have its form"),
    },
}


def key_of(page: str, one: Shown) -> str | None:
    """Return the key of a command's row; None where it has none."""
    keys = [key for key in ROWS.get(page, {}) if one.text.startswith(key)]
    return max(keys, key=len, default=None)
