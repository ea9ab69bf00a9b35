"""The committed reference files are those of the committed generator and of its table of cases."""

import hashlib
import json

import pytest

from tests.parity.cases import cases

LIMIT_BYTES = 1_500_000


@pytest.fixture
def root(repo):
    return repo / "tests" / "parity" / "reference"


@pytest.fixture
def manifest(root):
    return json.loads((root / "manifest.json").read_text(encoding="utf-8"))


def test_cases_are_those_compared(manifest):
    assert manifest["cases"] == [case.as_json() for case in cases("reference")]


def test_files_are_those_generated(root, manifest):
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != "manifest.json")
    found = {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }
    assert found == manifest["sha256"]
    assert sum(p.stat().st_size for p in files) < LIMIT_BYTES


def test_versions_are_the_pinned_ones(repo, manifest):
    lines = (repo / "constraints-peers.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for package, version in manifest["versions"].items():
        assert version.split("+")[0] == pins[package]
