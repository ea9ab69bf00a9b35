"""The files of deploy/ in use: nginx before two servers, Prometheus beside them, the unit read.

    python -m tests.deploy_check

Needs Debian's nginx, prometheus and systemd-analyze, and openssl. Addresses and places of the files
are exchanged for free ports and a temporary directory; nothing else of them is.
"""

import itertools
import json
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.distributed.rank_server import free_port
from tests.served import REPO, Served, serving

DEPLOY = REPO / "deploy"
_NEEDED = ("nginx", "prometheus", "systemd-analyze", "openssl")
_PACKAGES = ("nginx-light", "prometheus", "systemd", "openssl")
_PATIENCE_S = 30.0


def _said(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def exchanged(file: str, place: Path, words: dict[str, str]) -> Path:
    """Write a file of deploy/ with other addresses; each has to stand in it."""
    text = (DEPLOY / file).read_text("utf-8")
    for old, new in words.items():
        assert old in text, f"{file} has no {old}"
        text = text.replace(old, new)
    (place / file).write_text(text, "utf-8")
    return place / file


def check_unit(place: Path) -> None:
    """Let systemd read the unit; its program is this checkout's, its user one that is there."""
    words = {"/opt/llama-paddle": str(REPO), "User=llama": "User=daemon", "Group=llama\n": ""}
    exchanged("llama-paddle@.service", place, words)
    said = _said(["systemd-analyze", "verify", str(place / "llama-paddle@a.service")])
    assert "llama-paddle" not in said, said
    print("systemd: llama-paddle@.service is read without a complaint")


@contextmanager
def nginx(place: Path, ports: list[int], page_port: int = 8010) -> Iterator[tuple[str, Path]]:
    """Run nginx in front of two servers and a chat page; yields its address and its log."""
    port, log = free_port(), place / "llama.log"
    _said(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-keyout", str(place / "server.key")),
            *("-out", str(place / "server.pem")),
        ]
    )
    words = {
        f"127.0.0.1:{old}": f"127.0.0.1:{new}"
        for old, new in zip((8010, 8011, 8021), (page_port, *ports), strict=True)
    }
    words |= {"listen 443": f"listen {port}", "/etc/llama-paddle/tls": str(place)}
    words |= {"/run/nginx.pid": str(place / "nginx.pid"), "/var/log/nginx/llama.log": str(log)}
    file = exchanged("nginx.conf", place, words)
    _said(["nginx", "-t", "-q", "-c", str(file), "-e", str(place / "error.log")])
    print("nginx: the configuration is read without a complaint")
    command = ["nginx", "-c", str(file), "-e", str(place / "error.log"), "-g", "daemon off;"]
    process = subprocess.Popen(command)
    try:
        time.sleep(0.5)
        yield f"https://127.0.0.1:{port}", log
    finally:
        process.terminate()
        process.wait()


def ask(url: str, key: str, **body: Any) -> tuple[str, list[float]]:
    """Return an answer's text and the moments at which its pieces came."""
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    sent = {"prompt": "Hello", "temperature": 0, "ignore_eos": True, **body}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(sent).encode(), head)
    trusting = ssl._create_unverified_context()  # the certificate is a minute old
    moments, lines = [], []
    with urllib.request.urlopen(request, timeout=_PATIENCE_S, context=trusting) as answer:
        for line in answer:
            if line.strip():
                moments.append(time.monotonic())
                lines.append(line.decode())
    return "".join(lines), moments


def check_nginx(place: Path, servers: list[Served]) -> None:
    """Stream through nginx; clients keep to their servers, and pass to the other when one dies."""
    with nginx(place, [server.port for server in servers]) as (url, log):
        text, moments = ask(url, "a", max_tokens=150, stream=True)
        assert text.rstrip().endswith("data: [DONE]") and len(moments) > 100
        spread = moments[-1] - moments[0]
        gaps = [b - a for a, b in itertools.pairwise(moments)]
        assert max(gaps) < spread / 2, "the stream came in one piece"
        print(f"nginx: {len(moments)} events of a stream came over {1000 * spread:.0f} ms")
        keys = [f"key {n}" for n in range(12)]
        answers = {key: ask(url, key, max_tokens=4)[0] for key in keys for _ in range(3)}
        found: dict[str, set[str]] = {}
        rows = [line.split() for line in log.read_text().splitlines()][1:]
        for number, row in enumerate(rows):
            found.setdefault(keys[number // 3], set()).add(row[6])
        assert all(len(one) == 1 for one in found.values()), found
        assert len(set.union(*found.values())) == 2, found
        print("nginx: each of 12 clients keeps to one server, and both servers have clients")
        servers[0].stop()
        for key in keys:
            said = json.loads(ask(url, key, max_tokens=4)[0])["choices"]
            assert said == json.loads(answers[key])["choices"]
        print("nginx: with one server gone, the other answers all 12 as before")


def dashboard() -> list[str]:
    """Return the queries of the dashboard, as Grafana would send them."""
    panels = json.loads((DEPLOY / "grafana.json").read_text("utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    return [one.replace("$__rate_interval", "30s").replace("$model", ".*") for one in queries]


def check_prometheus(place: Path, servers: list[Served], ports: list[int]) -> None:
    """Let Prometheus scrape the servers, and run every query of the dashboard."""
    words = {
        f"127.0.0.1:{n}": f"127.0.0.1:{port}" for n, port in zip((8012, 8022), ports, strict=True)
    }
    words["interval: 5s"] = "interval: 1s"
    file, port = exchanged("prometheus.yml", place, words), free_port()
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={place / 'tsdb'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + _PATIENCE_S
        while True:
            for server in servers:
                server.post("/v1/completions", {"prompt": "Hello " * 20, "max_tokens": 5})
            empty = [one for one in dashboard() if not _series(port, one)]
            if not empty:
                break
            assert time.monotonic() < end, f"without a result: {empty}"
            time.sleep(1)
        print(f"prometheus: all {len(dashboard())} queries of the dashboard have results")
    finally:
        process.terminate()
        process.wait()


def _series(port: int, query: str) -> list[Any]:
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE_S) as answer:
            result: list[Any] = json.loads(answer.read())["data"]["result"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{query}: {error.read().decode()}") from error
    except OSError:  # it starts
        return []
    return [one for one in result if not re.fullmatch("NaN", str(one["value"][1]))]


def main() -> int:
    """Check what there are programs for; the status is 1 where one is missing."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        print(f"missing: {', '.join(missing)}; on Debian: apt install {' '.join(_PACKAGES)}")
        return 1
    with tempfile.TemporaryDirectory(prefix="deploy-") as name, ExitStack() as stack:
        place = Path(name)
        check_unit(place)
        ports, servers = [free_port(), free_port()], []
        for number, port in enumerate(ports):
            (place / str(number)).mkdir()
            flags = ["--management_port", str(port), "--max_length", "200", "--threads", "1"]
            servers.append(stack.enter_context(serving(place / str(number), flags)))
        check_prometheus(place, servers, ports)
        check_nginx(place, servers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
