"""TLS of the server on real sockets, with certificates that openssl made."""

import asyncio
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from certificates import Authority
from serving_process import ServerProcess, fake_server

from common.errors import UserError
from common.flags import load
from llm.config.serving import ServerArguments
from llm.serving.batch_client import GoneError, asking_server
from llm.serving.page.client import ApiClient
from llm.serving.settings import OperatorFiles

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("tls") / "ca")
    made.sign("server", host="127.0.0.1")
    made.sign("good")
    made.sign("expired", end="20210101000000Z")
    made.sign("revoked")
    made.revoke("revoked")
    return made


@pytest.fixture(scope="module")
def server(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    here = authority.here
    flags = [f"--ssl_certfile={here}/server.pem", f"--ssl_keyfile={here}/server.key"]
    flags += [f"--ssl_ca_certs={here}/ca.pem", f"--ssl_crl={here}/crl.pem"]
    with fake_server(tmp_path_factory.mktemp("server"), *flags, answer="hello world") as process:
        process.wait_for_log("API ready: https://")
        process.url = process.url.replace("http:", "https:")
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log.read_text()


def ask(server: ServerProcess, authority: Authority, client: str | None) -> requests.Response:
    here = authority.here
    pair = None if client is None else (f"{here}/{client}.pem", f"{here}/{client}.key")
    url = f"{server.url}/v1/completions"
    return requests.post(url, json={"prompt": "x"}, cert=pair, verify=f"{here}/ca.pem", timeout=10)


def test_a_client_with_a_certificate_is_answered(
    server: ServerProcess, authority: Authority
) -> None:
    answer = ask(server, authority, "good")
    assert answer.json()["choices"][0]["text"] == "hello world"


@pytest.mark.parametrize("client", [None, "expired", "revoked"])
def test_others_are_refused(
    server: ServerProcess, authority: Authority, client: str | None
) -> None:
    with pytest.raises(requests.exceptions.ConnectionError):
        ask(server, authority, client)
    assert ask(server, authority, "good").ok, "and the server goes on"


def test_a_batch_says_whom_it_does_not_know(server: ServerProcess) -> None:
    async def ask() -> None:
        async with asking_server(server.url, None, 99, 5.0)():
            raise AssertionError("it was let in")

    with pytest.raises(GoneError, match="SSL_CERT_FILE"):
        asyncio.run(ask())


def test_another_authority_s_client_is_refused(
    server: ServerProcess, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    other.sign("good")
    pair = f"{other.here}/good.pem", f"{other.here}/good.key"
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(
            f"{server.url}/health", cert=pair, verify=f"{authority.here}/ca.pem", timeout=10
        )


def test_a_stream_under_curl(server: ServerProcess, authority: Authority) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    here = authority.here
    words = ["curl", "-sS", "--cacert", f"{here}/ca.pem", "--cert", f"{here}/good.pem"]
    words += ["--key", f"{here}/good.key", "-H", "Content-Type: application/json"]
    words += ["-d", '{"prompt": "x", "stream": true}', f"{server.url}/v1/completions"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    assert result.stdout.endswith("data: [DONE]\n\n") and '"hello"' in result.stdout


def test_tls_1_2_which_remembers_clients_is_no_way_in(
    server: ServerProcess, authority: Authority
) -> None:
    context = ssl.create_default_context(cafile=authority.here / "ca.pem")
    context.load_cert_chain(authority.here / "good.pem", authority.here / "good.key")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(raw, server_hostname="127.0.0.1")


def test_plain_http_is_no_way_in(server: ServerProcess) -> None:
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(server.url.replace("https:", "http:") + "/health", timeout=10)


def test_the_page_knows_the_certificate_of_its_api(authority: Authority, tmp_path: Path) -> None:
    """By whatever name it reaches it; another certificate of the same authority is refused."""
    named = authority.sign("named")  # for no address
    key = named.with_suffix(".key")
    flags = [f"--ssl_certfile={named}", f"--ssl_keyfile={key}"]
    with fake_server(tmp_path, *flags, answer="hello world") as server:
        server.wait_for_log("API ready: https://")
        url = server.url.replace("http:", "https:")

        async def state(certificate: Path) -> str:
            return (await ApiClient(url, str(certificate)).status({}))["state"]

        assert asyncio.run(state(named)) == "ok"
        assert asyncio.run(state(authority.here / "server.pem")) == "gone"


class Peer:
    """A client with a certificate, and with the session of its last connection."""

    def __init__(self, authority: Authority, name: str) -> None:
        here = authority.here
        self._context = ssl.create_default_context(cafile=here / "ca.pem")
        self._context.load_cert_chain(here / f"{name}.pem", here / f"{name}.key")
        self._session: ssl.SSLSession | None = None

    def serial(self, port: int) -> str:
        """Ask for ``/health``; return the number of the server's certificate."""
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
            self._context.wrap_socket(
                raw, server_hostname="127.0.0.1", session=self._session
            ) as one,
        ):
            one.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if not (said := one.recv(100)):
                raise ConnectionResetError
            assert said.startswith(b"HTTP/1.1 200")
            self._session = one.session
            return str(one.getpeercert()["serialNumber"])


def test_renewed_files_count_after_sighup(tmp_path: Path) -> None:
    """Wrong ones do not; whoever has been revoked finds no way around it by a session of before."""
    authority = Authority(tmp_path / "ca")
    here = authority.here
    for name in ("server", "good", "leaver", "revoked"):
        authority.sign(name, host="127.0.0.1")
    authority.revoke("revoked")
    flags = [f"--ssl_certfile={here}/server.pem", f"--ssl_keyfile={here}/server.key"]
    flags += [f"--ssl_ca_certs={here}/ca.pem", f"--ssl_crl={here}/crl.pem"]
    good, leaver = Peer(authority, "good"), Peer(authority, "leaver")
    with fake_server(tmp_path, *flags) as server:
        server.wait_for_log("API ready")
        before = {good.serial(server.port), leaver.serial(server.port)}
        (here / "server.pem").write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("TLS stays as it was: ssl_certfile=.*cannot be used")
        assert {good.serial(server.port)} == before
        authority.sign("server", host="127.0.0.1")
        authority.revoke("leaver")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("the files of TLS were read again")
        assert good.serial(server.port) not in before
        with pytest.raises((ssl.SSLError, ConnectionError)):
            leaver.serial(server.port)
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


@pytest.mark.long
def test_the_page_itself_speaks_tls_and_finds_its_api(authority: Authority, tmp_path: Path) -> None:
    here = authority.here
    flags = [f"--ssl_certfile={here}/server.pem", f"--ssl_keyfile={here}/server.key"]
    with fake_server(tmp_path, *flags, page=True, answer="ok") as server:
        server.wait_for_log("chat page ready: https://")
        server.wait_for_log("API ready: https://")
        url = server.page_url.replace("http:", "https:")
        ca = f"{here}/ca.pem"
        assert "<html" in requests.get(url, verify=ca, timeout=10).text
        assert requests.get(f"{url}/status", verify=ca, timeout=10).json()["state"] == "ok"
        before = ssl.get_server_certificate(("127.0.0.1", server.page_port))
        authority.sign("server", host="127.0.0.1")
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 20
        while ssl.get_server_certificate(("127.0.0.1", server.page_port)) == before:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert requests.get(f"{url}/status", verify=ca, timeout=10).json()["state"] == "ok"
        with pytest.raises(requests.exceptions.ConnectionError):
            requests.get(server.page_url, timeout=10)
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def arguments(*words: str) -> ServerArguments:
    return load((ServerArguments,), [*words, "--no_ui"], prog="server.py")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ssl_keyfile={ca}/server.key"], "says nothing without --ssl_certfile"),
        (["--ssl_certfile={ca}/server.pem", "--ssl_crl={ca}/crl.pem"], "without --ssl_ca_certs"),
        (["--ssl_certfile={ca}/none.pem"], "ssl_certfile=.*none.pem cannot be read"),
        (["--ssl_certfile={ca}/server.pem"], "ssl_certfile=.*and ssl_keyfile=.*cannot be used"),
        (
            ["--ssl_certfile={ca}/server.pem", "--ssl_keyfile={ca}/good.key"],
            "ssl_keyfile=.*good.key cannot be used: key values mismatch",
        ),
        (["{good}", "--ssl_ca_certs={ca}/openssl.cnf"], "ssl_ca_certs=.*cannot be used"),
        (["{good}", "--ssl_ca_certs={ca}/crl.pem"], "ssl_ca_certs=.*crl.pem holds none"),
        (
            ["{good}", "--ssl_ca_certs={ca}/ca.pem", "--ssl_crl={ca}/ca.pem"],
            "ssl_crl=.*ca.pem holds none",
        ),
    ],
)
def test_bad_files_are_told_by_flag(authority: Authority, words: list[str], message: str) -> None:
    good = ["--ssl_certfile={ca}/server.pem", "--ssl_keyfile={ca}/server.key"]
    given = [one for word in words for one in (good if word == "{good}" else [word])]
    with pytest.raises(UserError, match=message):
        OperatorFiles(arguments(*(one.format(ca=authority.here) for one in given)))


def test_one_file_may_hold_both(authority: Authority, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    parts = (authority.here / "server.key", authority.here / "server.pem")
    both.write_text("".join(part.read_text() for part in parts))
    found = OperatorFiles(arguments(f"--ssl_certfile={both}")).tls
    assert found is not None and found.context.verify_mode == ssl.CERT_NONE


def test_the_page_is_no_way_around_clients_certificates(authority: Authority) -> None:
    flags = [
        f"--ssl_certfile={authority.here}/server.pem",
        f"--ssl_ca_certs={authority.here}/ca.pem",
    ]
    with pytest.raises(UserError, match=r"the chat page cannot ask browsers.*--no_ui"):
        load((ServerArguments,), flags, prog="server.py")
