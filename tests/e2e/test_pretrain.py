"""run_pretrain.py from the command line: the documented line, SIGKILL and resume, real text."""

import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest

from data.corpus.token_store_writer import TokenStoreWriter
from data.tokenization.batch import encode_batch
from data.tokenizer import load_tokenizer
from llm.llama.config import load_config
from tests.e2e.training_process import kill_after, run, together

TINY = "__internal_testing__/tiny-random-llama"


def command(repo, *words, **flags):
    pairs = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(repo / "run_pretrain.py"), *words, *pairs]


def losses(output_dir):
    """Return what training and evaluation logged, without the timings."""
    names = ("step", "loss", "learning_rate", "grad_norm", "eval_loss", "consumed_samples")
    lines = (output_dir / "train_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in names} for line in lines]


def assert_equal_runs(first, second, step):
    assert losses(first) == losses(second)
    for name in ("model.safetensors", f"checkpoint-{step}/optimizer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def write_store(prefix, documents, layout="bin"):
    with TokenStoreWriter(prefix, np.uint16, layout=layout) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store whose next token is mostly predictable, so that losses move."""
    return counting_store(tmp_path_factory.mktemp("store") / "corpus", seed=0, steps=3)


def counting_store(prefix, *, seed, steps):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(100, 400, 300)
    documents = [np.cumsum(rng.integers(0, steps, size)) % 1000 for size in sizes]
    return write_store(prefix, documents)


def test_help_and_refusals_load_neither_paddle_nor_paddlenlp(repo, tmp_path):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['run_pretrain.py', *sys.argv[1:]]\n"
        "try:\n    runpy.run_path('run_pretrain.py', run_name='__main__')\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print(status, [m for m in ('paddle', 'paddlenlp', 'matplotlib') if m in sys.modules])"
    )
    said = run([sys.executable, "-c", code, "--help"], repo).stdout
    assert "--train_tokens" in said and said.endswith("0 []\n")
    words = ["--do_train", "--max_steps", "3", "--model_name_or_path", TINY, "--input_dir", "x/y"]
    refused = run([sys.executable, "-c", code, *words, "--output_dir", str(tmp_path)], repo)
    assert refused.stdout == "2 []\n"
    assert (
        refused.stderr.startswith("error: no token store at x/y") and "Trace" not in refused.stderr
    )


def documented_command(repo):
    """Return the classic command line as docs/pretrain.md gives it."""
    text = (repo / "docs" / "pretrain.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```bash\n(.*?)```", text, re.S) if "launch" in b)
    words = shlex.split(block.replace("\\\n", " "))
    assert words[0] == "python"
    script = words.index("run_pretrain.py")
    return [sys.executable, *words[1:script], str(repo / "run_pretrain.py"), *words[script + 1 :]]


def test_the_documented_command_runs_as_it_stands(repo, store, tmp_path):
    shutil.copytree(store.parent, tmp_path / "data")
    said = run(documented_command(repo), tmp_path)
    output = tmp_path / "output"
    config = load_config(output)
    assert config == load_config(TINY)
    assert load_tokenizer(output).vocab_size <= config.vocab_size
    steps = [record["step"] for record in losses(output) if "loss" in record]
    assert steps == [1, 2, 3, 4]
    assert json.loads((output / "eval_results.json").read_text())["eval_tokens"] >= 2048
    assert (output / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert any((output / "runs").iterdir())
    assert "MFU" in said.stderr + said.stdout and "peak memory" in said.stderr + said.stdout


def test_the_documented_command_with_float16_is_refused_on_a_cpu(repo, tmp_path):
    words = documented_command(repo)
    words = [sys.executable, *words[words.index(str(repo / "run_pretrain.py")) :]]
    half = ["--fp16", "--fp16_opt_level", "O2", "--scale_loss", "1024"]
    refused = run([*words, *half], tmp_path, expect=2)
    assert refused.stderr.startswith("error: fp16 needs a GPU") and not list(tmp_path.iterdir())


def test_a_killed_run_resumes_to_the_same_bits(repo, store, tmp_path, trainers):
    """In a blend, with fused kernels, recomputation, workers, a cut log interval and debris."""
    other = counting_store(tmp_path / "other", seed=1, steps=9)
    words = command(
        repo,
        model_name_or_path=TINY,
        input_dir=f"0.7 {store} 0.3 {other}",
        max_seq_length=64,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="wsd",
        warmup_steps=3,
        max_steps=40,
        save_steps=10,
        eval_steps=15,
        logging_steps=7,
        save_total_limit=3,
        dataloader_num_workers=2,
        threads=1,
        use_flash_attention="true",
        use_fused_rms_norm="true",
        recompute="true",
        do_train="true",
        do_eval="true",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    together(
        lambda: run([*words, "--output_dir", str(whole)], repo, ranks=trainers),
        lambda: kill_after(
            [*words, "--output_dir", str(cut)], repo, cut / "checkpoint-20", trainers
        ),
    )
    assert not (cut / "checkpoint-40").exists()
    (cut / ".checkpoint-30.1.tmp").mkdir(exist_ok=True)
    shutil.copytree(cut / "checkpoint-20", cut / "checkpoint-35")
    (cut / "checkpoint-35" / "model.safetensors").unlink()
    words += ["--output_dir", str(cut), "--resume_from_checkpoint", "true"]
    again = run(words, repo, ranks=trainers)
    assert "checkpoint-35: model.safetensors is missing" in again.stderr
    assert "left by an interrupted save" in again.stderr
    shutil.rmtree(cut / "checkpoint-35")
    assert_equal_runs(whole, cut, 40)
    random_state = "checkpoint-40/random_state.json"
    assert (whole / random_state).read_bytes() == (cut / random_state).read_bytes()
    assert [p.name for p in sorted(cut.glob("checkpoint-*"))] == [
        f"checkpoint-{step}" for step in (20, 30, 40)
    ]


@pytest.mark.long
def test_a_run_that_ended_goes_on_with_other_data_to_the_same_bits(repo, store, tmp_path, trainers):
    """Its first store is gone; and a checkpoint behind that is gone on from as any other."""
    first = counting_store(tmp_path / "first" / "s", seed=2, steps=5)
    other = counting_store(tmp_path / "other", seed=1, steps=9)

    def words(output, stores, steps, *more):
        return [
            *command(
                repo,
                *more,
                model_name_or_path=TINY,
                input_dir=stores,
                max_seq_length=32,
                per_device_train_batch_size=2,
                learning_rate=0.01,
                lr_scheduler_type="cosine",
                max_steps=steps,
                save_steps=2,
                logging_steps=1,
                threads=1,
                do_train="true",
                output_dir=output,
            )
        ]

    run(words(tmp_path / "out", first, 4), repo, ranks=trainers)
    shutil.rmtree(first.parent)
    blend, resume = f"1 {store} 2 {other}", "--resume_from_checkpoint"
    said = run(words(tmp_path / "out", blend, 9, resume, "true"), repo, ranks=trainers).stderr
    assert (
        "the run had ended and goes on with other data: from sample 8 on it takes 33.33% " in said
    )
    assert "the learning rate changes here: update 5 takes" in said and "a jump up" in said
    middle = str(tmp_path / "out" / "checkpoint-6")
    run(words(tmp_path / "again", blend, 9, resume, middle), repo, ranks=trainers)
    assert losses(tmp_path / "out")[6:] == losses(tmp_path / "again")
    for name in ("model.safetensors", "checkpoint-9/optimizer.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_wikitext_from_both_layouts_with_a_kill_in_between(repo, shared_data, tmp_path, trainers):
    """100 steps on WikiText-2: .bin/.idx in one go, .npy/.npz killed and resumed."""
    tokenizer = load_tokenizer(shared_data / "llama2.tokenizer.model")
    text = (shared_data / "wikitext2.valid.txt").read_text(encoding="utf-8")
    articles = re.split(r"\n(?= = [^=])", text)
    documents = encode_batch(tokenizer, articles, add_eos=True)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    shape = load_config(TINY).replace(vocab_size=tokenizer.vocab_size, **small)
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(shape.to_hf()))
    for layout in ("bin", "npy"):
        write_store(tmp_path / layout / "wikitext", documents, layout)

    def words(layout):
        return command(
            repo,
            model_name_or_path=tmp_path / "shape",
            tokenizer_name_or_path=shared_data / "llama2.tokenizer.model",
            input_dir=tmp_path / layout,
            output_dir=tmp_path / f"out-{layout}",
            max_seq_length=32,
            per_device_train_batch_size=4,
            learning_rate=0.003,
            lr_scheduler_type="cosine",
            max_steps=100,
            save_steps=25,
            logging_steps=10,
            threads=1,
            do_train="true",
        )

    together(
        lambda: run(words("bin"), repo, ranks=trainers),
        lambda: kill_after(words("npy"), repo, tmp_path / "out-npy" / "checkpoint-50", trainers),
    )
    run([*words("npy"), "--resume_from_checkpoint", "true"], repo, ranks=trainers)
    assert_equal_runs(tmp_path / "out-bin", tmp_path / "out-npy", 100)
    first, *_, last = losses(tmp_path / "out-bin")
    assert last["loss"] < first["loss"] - 1
