"""MindIE's config.json as flags: what it sets, what it says, what it refuses."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.flags import load
from llm.config import mindie
from llm.config.scripts import SCRIPTS

# As an installation has it, but for the values; every section, and keys of several versions.
WHOLE: dict[str, Any] = {
    "Version": "1.0.0",
    "LogConfig": {"logLevel": "Info", "logFileSize": 20, "logFileNum": 20, "logPath": "logs/a"},
    "ServerConfig": {
        "ipAddress": "127.0.0.1",
        "managementIpAddress": "127.0.0.2",
        "port": 1025,
        "managementPort": 1026,
        "metricsPort": 1027,
        "allowAllZeroIpListening": False,
        "maxLinkNum": 300,
        "httpsEnabled": True,
        "fullTextEnabled": False,
        "tlsCaPath": "security/ca/",
        "tlsCaFile": ["ca.pem"],
        "tlsCert": "security/certs/server.pem",
        "tlsPk": "security/keys/server.key.pem",
        "tlsPkPwd": "security/pass/key_pwd.txt",
        "tlsCrlPath": "security/certs/",
        "tlsCrlFiles": ["server_crl.pem"],
        "managementTlsCaFile": ["management_ca.pem"],
        "managementTlsCert": "security/certs/management/server.pem",
        "kmcKsfMaster": "tools/pmt/master/ksfa",
        "inferMode": "standard",
        "interCommTLSEnabled": True,
        "interCommPort": 1121,
        "openAiSupport": "vllm",
        "tokenTimeout": 600,
        "e2eTimeout": 600,
        "maxRequestLength": 40,
        "distDPServerEnabled": False,
    },
    "BackendConfig": {
        "backendName": "mindieservice_llm_engine",
        "modelInstanceNumber": 1,
        "npuDeviceIds": [[0, 1, 2, 3]],
        "tokenizerProcessNumber": 8,
        "multiNodesInferEnabled": False,
        "multiNodesInferPort": 1120,
        "interNodeTLSEnabled": True,
        "ModelDeployConfig": {
            "maxSeqLen": 2560,
            "maxInputTokenLen": 2048,
            "truncation": False,
            "maxLoras": 4,
            "LoraModules": [{"name": "de", "path": "/lora/de", "baseModelName": "llama"}],
            "ModelConfig": [
                {
                    "modelInstanceType": "Standard",
                    "modelName": "llama",
                    "modelWeightPath": "/weights/llama",
                    "worldSize": 4,
                    "cpuMemSize": 5,
                    "npuMemSize": -1,
                    "backendType": "atb",
                    "trustRemoteCode": False,
                    "plugin_params": '{"plugin_type":"prefix_cache,la","level":4}',
                }
            ],
        },
        "ScheduleConfig": {
            "templateType": "Standard",
            "templateName": "Standard_LLM",
            "cacheBlockSize": 128,
            "maxPrefillBatchSize": 50,
            "maxPrefillTokens": 8192,
            "prefillTimeMsPerReq": 150,
            "prefillPolicyType": 0,
            "decodeTimeMsPerReq": 50,
            "decodePolicyType": 0,
            "maxBatchSize": 200,
            "maxIterTimes": 512,
            "maxPreemptCount": 0,
            "supportSelectBatch": False,
            "maxQueueDelayMicroseconds": 5000,
        },
    },
}
SETS = {
    "host": "127.0.0.1",
    "flask_port": 1025,
    "management_host": "127.0.0.2",
    "management_port": 1026,
    "max_queue": 700,
    "max_body_bytes": 40 << 20,
    "ssl_certfile": "security/certs/server.pem",
    "ssl_keyfile": "security/keys/server.key.pem",
    "ssl_ca_certs": "security/ca/ca.pem",
    "no_ui": True,
    "ssl_crl": "security/certs/server_crl.pem",
    "max_model_len": 2560,
    "src_length": 2048,
    "model_id": "llama",
    "model_name_or_path": "/weights/llama",
    "adapters": ["de=/lora/de"],
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 200,
    "max_length": 512,
    "max_queue_delay_microseconds": 5000,
}
# Where a change goes, by the first letters of the section.
PLACES = {
    "": (),
    "ServerConfig": ("ServerConfig",),
    "BackendConfig": ("BackendConfig",),
    "ModelDeployConfig": ("BackendConfig", "ModelDeployConfig"),
    "ModelConfig": ("BackendConfig", "ModelDeployConfig", "ModelConfig", 0),
    "ScheduleConfig": ("BackendConfig", "ScheduleConfig"),
}


def written(tmp_path: Path, **changes: Any) -> str:
    """Write the file with ``Section__key=value`` changed; None takes a key out."""
    content = copy.deepcopy(WHOLE)
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        place: Any = content
        for part in PLACES[section]:
            place = place[part]
        place[key] = value
        if value is None:
            del place[key]
    path = tmp_path / "conf" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def test_every_setting(tmp_path: Path) -> None:
    found = {one.name: one.value for one in mindie.settings(written(tmp_path))}
    for name in [name for name in SETS if name.startswith("ssl_")]:
        found[name] = str(Path(found[name]).relative_to(tmp_path))  # beside conf, as MindIE has it
    assert found == SETS


def test_what_has_no_effect_is_said_with_why(tmp_path: Path) -> None:
    path = written(tmp_path)
    said = " ".join(mindie.without_effect(path))
    named = {word for word in _words(path) if "Config." in word}
    everything = {
        f"{place[-1] if isinstance(place[-1], str) else 'ModelConfig'}.{key}"
        for place in ((*PLACES[name], name)[:-1] or ("",) for name in PLACES if name)
        for key in _at(place)
    } | {f"LogConfig.{key}" for key in WHOLE["LogConfig"]}
    # Unread by MindIE itself beside the others, at the usual value, or read elsewhere.
    silent = {
        *("allowAllZeroIpListening", "maxLinkNum", "httpsEnabled", "fullTextEnabled", "tlsCaPath"),
        *("tlsCrlPath", "inferMode", "interCommTLSEnabled", "interCommPort", "openAiSupport"),
        *("distDPServerEnabled", "modelInstanceNumber", "multiNodesInferEnabled", "ModelConfig"),
        *("multiNodesInferPort", "interNodeTLSEnabled", "ModelDeployConfig", "ScheduleConfig"),
        *("truncation", "LoraModules", "modelInstanceType", "npuMemSize", "trustRemoteCode"),
        *("templateName", "prefillTimeMsPerReq", "decodeTimeMsPerReq", "prefillPolicyType"),
        *("decodePolicyType", "maxPreemptCount", "supportSelectBatch"),
    }
    flags = {one.source.rpartition(": ")[2] for one in mindie.settings(written(tmp_path))}
    rest = {key for key in everything if key.partition(".")[2] not in silent} - flags
    assert named == rest
    assert "start 4 with python -m paddle.distributed.launch --nproc_per_node 4" in said
    assert "plugin_params la (--prompt_lookup_num_tokens guesses tokens)" in said
    assert "prefix_cache" not in said, "it is always on"


def _words(path: str) -> set[str]:
    """Return the words of what is said, with keys of MindIE's among them."""
    words = {word.strip("(),") for line in mindie.without_effect(path) for word in line.split()}
    return words | {word.rpartition(".")[2] for word in words}


def _at(place: tuple[Any, ...]) -> Any:
    content: Any = WHOLE
    for part in place:
        content = content[part]
    return content


def test_tls_that_names_no_files_is_not_left_out(tmp_path: Path) -> None:
    """MindIE looks in its own places; a server that spoke plain HTTP instead would not say so."""
    path = written(tmp_path, ServerConfig__tlsCert=None, ServerConfig__tlsPk="")
    found = {one.name: one.value for one in mindie.settings(path)}
    assert str(found["ssl_certfile"]).endswith("/security/certs/server.pem")
    assert str(found["ssl_keyfile"]).endswith("/security/keys/server.key.pem")


def test_without_tls_its_files_are_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, ServerConfig__httpsEnabled=False)
    assert not [one for one in mindie.settings(path) if one.name.startswith("ssl_")]
    assert not {"tlsPkPwd", "managementTlsCert", "kmcKsfMaster"} & _words(path)


REFUSED = [
    ({"ServerConfig__httpsEnabled": None}, "httpsEnabled has to say true or false, not None"),
    ({"ServerConfig__ipAddress": "0.0.0.0"}, "allowAllZeroIpListening is not true"),
    ({"ServerConfig__fullTextEnabled": True}, "fullTextEnabled=true has no counterpart here"),
    ({"ServerConfig__inferMode": "dmi"}, 'inferMode="dmi" has no counterpart here'),
    ({"ScheduleConfig__maxBatchSize": True}, "ScheduleConfig.maxBatchSize=True is not a whole"),
    ({"ServerConfig__tlsCaFile": ["a", "b"]}, "one file holds all: join them with cat"),
    ({"ServerConfig__tlsCrt": "a"}, "unknown 'ServerConfig.tlsCrt'; did you mean 'tlsCert'"),
    ({"ServerConfig__maxRequestLength": "x"}, "maxRequestLength='x' is not a whole number"),
    ({"ServerConfig__maxLinkNum": "x"}, "maxLinkNum='x' is not a whole number"),
    ({"BackendConfig__modelInstanceNumber": 2}, "start a server for each instance"),
    ({"BackendConfig__multiNodesInferEnabled": True}, "launch on every machine"),
    ({"ModelDeployConfig__truncation": True}, "a prompt that is too long is refused"),
    ({"ModelDeployConfig__ModelConfig": []}, "has to be a list of one model"),
    ({"ModelDeployConfig__LoraModules": [{"name": "a"}]}, "an object with name and path"),
    ({"ModelConfig__dp": 2}, "dp=2 has no counterpart here"),
    ({"ModelConfig__plugin_params": '{"plugin_type": "other"}'}, "plugins that have one are"),
    ({"ModelConfig__plugin_params": "la"}, "is not the JSON of an object"),
    ({"ScheduleConfig__zzz": 2}, "unknown 'ScheduleConfig.zzz'; take it out of a copy"),
    ({"__ServerConfig": None}, "is not MindIE's: it has no ServerConfig"),
    ({"__ServerConfig": 3}, "ServerConfig has to be an object, not 3"),
    ({"__Version": "2"}, 'Version="2" has no counterpart'),
    ({"__OtherParam": {}}, "is of MindIE 1.0.RC2 or older"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals(tmp_path: Path, changes: Any, message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        mindie.settings(path)
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


PLAIN = {"ServerConfig__httpsEnabled": False, "ModelDeployConfig__LoraModules": None}


def loaded(tmp_path: Path, words: str, **changes: Any) -> Any:
    path = written(tmp_path, **PLAIN, **changes)
    return load(SCRIPTS["server.py"], ["--config", path, *words.split()], prog="server.py")


def test_the_command_line_goes_first(tmp_path: Path) -> None:
    server, place, *_ = loaded(tmp_path, "--flask_port 9000 --model_name_or_path m")
    assert (server.flask_port, server.max_num_seqs, server.max_model_len) == (9000, 200, 2560)
    assert (place.model_name_or_path, server.model_id) == ("m", "llama")
    assert list(server.without_effect())


def test_a_value_out_of_bounds_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ScheduleConfig.maxBatchSize: max_num_seqs=2000"):
        loaded(tmp_path, "", ScheduleConfig__maxBatchSize=2000)


def test_two_files_that_differ(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("max_length: 7")
    words = [str(own), "--config", written(tmp_path, **PLAIN)]
    with pytest.raises(UserError, match=r"maxIterTimes sets max_length=512, and .*own.yaml sets 7"):
        load(SCRIPTS["server.py"], words, prog="server.py")


def test_no_such_file() -> None:
    with pytest.raises(UserError, match=r"config=absent.json cannot be read"):
        mindie.settings("absent.json")


def _places(value: Any) -> list[tuple[Any, ...]]:
    """Return the way to every value within a value, sections included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, ...]] = []
    for key, one in inner:
        found.append((key,))
        if isinstance(one, dict | list):
            found += [(key, *rest) for rest in _places(one)]
    return found


@pytest.mark.parametrize("odd", [None, True, -1, 1.5, 10**30, "", "x\0", [], [None], {}, {"a": 1}])
def test_any_value_is_read_or_refused(tmp_path: Path, odd: Any) -> None:
    """In every place: flags, or what is wrong with it."""
    path, refused = tmp_path / "config.json", 0
    for *way, last in _places(WHOLE):
        content = copy.deepcopy(WHOLE)
        place: Any = content
        for key in way:
            place = place[key]
        place[last] = odd
        path.write_text(json.dumps(content))
        try:
            mindie.settings(str(path))
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= 4, "sections at least"
