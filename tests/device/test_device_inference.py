"""Networks and exported programs on the rehearsal device, and scripts from the command line."""

import subprocess
import sys

from tests.device.conftest import TINY, words_of

# What a user's script would do: a sum over ranks on the current device.
SCRIPT = """
import paddle
import paddle.distributed as dist

paddle.set_device({device!r})
dist.init_parallel_env()
tensor = paddle.full([1], dist.get_rank() + 1.0)
dist.all_reduce(tensor)
print("sum", tensor.item(), "on", tensor.place)
"""


def test_an_exported_program_answers_as_the_network(device, tmp_path):
    """The script itself compares them, in a process of its own that has the device too."""
    flags = {"model_name_or_path": TINY, "device": "gpu", "output_path": tmp_path / "model"}
    device.script("gpu", "export_generation_model", words_of(flags))
    assert (tmp_path / "model.manifest.json").is_file()


def test_a_script_from_the_command_line(repo, device, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(device="rehearsal"), encoding="utf-8")
    command = [sys.executable, "-m", "tests.device.run", "--role", "itself", "--ranks", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"[{rank}] sum 3.0 on Place(rehearsal:0)" in done.stdout
