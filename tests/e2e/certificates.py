"""Certificates for tests, made by openssl: an authority, a server's, and clients' of every fate."""

import subprocess
from pathlib import Path

_CONFIG = """
[ca]
default_ca = own
[own]
dir = {here}
database = $dir/index.txt
serial = $dir/serial
crlnumber = $dir/crlnumber
new_certs_dir = $dir
certificate = $dir/ca.pem
private_key = $dir/ca.key
default_md = sha256
default_crl_days = 30
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
[req]
distinguished_name = name
prompt = no
[name]
CN = x
"""


def openssl(here: Path, *words: str) -> None:
    """Run it; fail with what it says."""
    result = subprocess.run(
        ["openssl", *words], cwd=here, capture_output=True, text=True, check=False, timeout=30
    )
    assert result.returncode == 0, result.stderr


class Authority:
    """Signs certificates, with validity of its own for each, and revokes them."""

    def __init__(self, here: Path) -> None:
        self.here = here
        here.mkdir()
        (here / "openssl.cnf").write_text(_CONFIG.format(here=here))
        (here / "index.txt").touch()
        (here / "serial").write_text("1000\n")
        (here / "crlnumber").write_text("01\n")
        self._request("ca", "/CN=authority", "-x509", "-days", "30")

    def _request(self, name: str, subject: str, *words: str) -> None:
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        out = f"{name}.pem" if "-x509" in words else f"{name}.csr"
        openssl(
            self.here, "req", *kind, "-keyout", f"{name}.key", "-subj", subject, *words, "-out", out
        )

    def sign(self, name: str, *, end: str = "20991231000000Z", host: str = "") -> Path:
        """Make a key and a certificate; return the certificate's file, ``NAME.pem``."""
        words = ["-addext", f"subjectAltName=IP:{host}"] if host else []
        self._request(name, f"/CN={name}", *words)
        dates = ["-startdate", "20200101000000Z", "-enddate", end]
        config = ["-config", "openssl.cnf", "-batch", "-notext"]
        openssl(self.here, "ca", *config, *dates, "-in", f"{name}.csr", "-out", f"{name}.pem")
        return self.here / f"{name}.pem"

    def revoke(self, name: str) -> Path:
        """Revoke a certificate; return the list of all that are."""
        openssl(self.here, "ca", "-config", "openssl.cnf", "-revoke", f"{name}.pem")
        openssl(self.here, "ca", "-config", "openssl.cnf", "-gencrl", "-out", "crl.pem")
        return self.here / "crl.pem"
