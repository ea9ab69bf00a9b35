"""MindIE's ``config.json`` as flags of ``server.py``.

Each key is a flag; or stands for what this server always does or never does, and is refused at
another value; or has no effect here, which :func:`without_effect` tells; or MindIE itself does not
read it beside the others. A key that is not known is refused: it may be one of these, misspelled.

Meaning and defaults of the keys: MindIE LLM developer guide, "service parameter configuration".
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import jsonl
from common.errors import DataError, UserError, near_name
from common.flags import Setting
from common.foreign import Becomes, Idle, Only, Row, is_value
from llm.parallel.rules import launched

MAX_QUEUE = 4096


class _Read:
    """The key is read together with others, or MindIE does not read it beside them."""


_Key = Row | _Read
_READ = _Read()
_ASCEND = Idle("where the model runs is said by --device and by paddle.distributed.launch")
_LOGS = Idle("logs go to the standard error stream, and to --access_log")
_SPLIT = Only((1, -1), "every process of a launch takes part of every matrix (worldSize)")
_STEPS = "prompts and answers share the steps of the engine, longer prompts in pieces"

_TOP: Mapping[str, _Key] = {
    "Version": Only(("1.0.0",), "only that version of the file is known"),
    "EnableDynamicAdjustTimeoutConfig": Idle("requests have no time limit", usual=(False,)),
    **dict.fromkeys(("ServerConfig", "BackendConfig", "LogConfig"), _READ),
}
_SERVER: Mapping[str, _Key] = {
    "ipAddress": Becomes("host"),
    "port": Becomes("flask_port"),
    "managementIpAddress": Becomes("management_host"),
    "managementPort": Becomes("management_port"),
    "maxRequestLength": Becomes("max_body_bytes", convert=lambda megabytes: int(megabytes) << 20),
    "fullTextEnabled": Only((False,), "each event of a stream carries what is new"),
    "inferMode": Only(("standard",), "one server computes both prompts and answers"),
    "distDPServerEnabled": Only((False,), "start a server for each copy of the model"),
    "openAiSupport": Idle("answers are OpenAI's, with vLLM's additions", usual=("vllm",)),
    "tokenTimeout": Idle("requests have no time limit but their own `timeout`"),
    "e2eTimeout": Idle("requests have no time limit but their own `timeout`"),
    **dict.fromkeys(("metricsPort", "allowAllZeroIpListening", "maxLinkNum"), _READ),
    # Of TLS, without which MindIE does not read them.
    **dict.fromkeys(("httpsEnabled", "tlsCaPath", "tlsCaFile", "tlsCert", "tlsPk"), _READ),
    **dict.fromkeys(("tlsPkPwd", "tlsCrlPath", "tlsCrlFiles", "kmcKsfMaster"), _READ),
    "kmcKsfStandby": _READ,
}
_OF_OTHER_PORTS = ("managementTls", "metricsTls")
_OF_CLUSTERS = ("interComm", "interNode", "multiNodesInferPort")
_BACKEND: Mapping[str, _Key] = {
    "backendName": _ASCEND,
    "npuDeviceIds": _ASCEND,
    "modelInstanceNumber": Only((1,), "start a server for each instance, each with its port"),
    "tokenizerProcessNumber": Idle("texts are cut into tokens where HTTP is served"),
    "multiNodesInferEnabled": Only(
        (False,), "start python -m paddle.distributed.launch on every machine"
    ),
    **dict.fromkeys(("ModelDeployConfig", "ScheduleConfig"), _READ),
}
_DEPLOY: Mapping[str, _Key] = {
    "maxSeqLen": Becomes("max_model_len"),
    "maxInputTokenLen": Becomes("src_length"),
    "truncation": Only((False,), "a prompt that is too long is refused"),
    "maxLoras": Idle("there is no limit; --adapter_dir lets more be loaded at run time"),
    "maxLoraRank": Idle("adapters of any rank are taken"),
    "speculationGamma": Idle("--prompt_lookup_num_tokens guesses tokens", usual=(0,)),
    **dict.fromkeys(("ModelConfig", "LoraModules"), _READ),
}
_MODEL: Mapping[str, _Key] = {
    "modelName": Becomes("model_id"),
    "modelWeightPath": Becomes("model_name_or_path"),
    "modelInstanceType": Only(("Standard",), "a model is always loaded"),
    "backendType": _ASCEND,
    "cpuMemSize": Idle("the cache lies in one memory; what does not fit is computed again"),
    "npuMemSize": Idle("--cache_blocks sets the size of the cache", usual=(-1,)),
    "trustRemoteCode": Idle("no code of a model directory is run", usual=(False,)),
    "models": Idle("they are switches of MindIE's own networks"),
    "tp": Idle("every process of a launch takes part of every matrix", usual=(1, -1)),
    **dict.fromkeys(("dp", "sp", "cp", "pp", "moe_tp", "moe_ep"), _SPLIT),
    "async_scheduler_wait_time": Idle("steps are not scheduled ahead"),
    **dict.fromkeys(("kv_trans_timeout", "kv_link_timeout"), _READ),  # of inferMode dmi
    **dict.fromkeys(("worldSize", "plugin_params"), _READ),
}
_SCHEDULE: Mapping[str, _Key] = {
    "maxBatchSize": Becomes("max_num_seqs"),
    "maxPrefillTokens": Becomes("max_num_batched_tokens"),
    "maxIterTimes": Becomes("max_length"),
    "maxQueueDelayMicroseconds": Becomes("max_queue_delay_microseconds"),
    "maxPrefillBatchSize": Idle("a step takes as many prompts as maxPrefillTokens hold"),
    "maxPreemptCount": Idle("a request gives way where the cache is full", usual=(0,)),
    "maxFirstTokenWaitTime": Idle("a request gives way where the cache is full"),
    "cacheBlockSize": Idle("blocks of the cache have one size"),
    "templateType": Idle(_STEPS, usual=("Mix",)),
    "templateName": Only(("Standard_LLM",), "the only workflow is that of language models"),
    "supportSelectBatch": Idle(_STEPS, usual=(False,)),
    "prefillPolicyType": Idle("requests come in turn, those with a `priority` first", usual=(0,)),
    "decodePolicyType": Idle("requests come in turn, those with a `priority` first", usual=(0,)),
    "enablePrefixCache": Idle("beginnings of prompts are always cached", usual=(True,)),
    # Of supportSelectBatch, without which MindIE does not read them.
    **dict.fromkeys(("prefillTimeMsPerReq", "decodeTimeMsPerReq"), _READ),
    **dict.fromkeys(("enableSplit", "splitType", "splitStartType"), Idle(_STEPS)),
    **dict.fromkeys(("splitChunkTokens", "splitStartBatchSize"), Idle(_STEPS)),
}
# Plugins of which nothing is missed, and what does the work of the others.
_PLUGINS = {
    "prefix_cache": "",
    "splitfuse": "",
    "la": "--prompt_lookup_num_tokens guesses tokens",
    "memory_decoding": "--prompt_lookup_num_tokens guesses tokens",
    "mtp": "--draft_model_name_or_path guesses tokens",
}


@dataclass
class _Found:
    """What a file says, as it is read."""

    path: Path
    settings: list[Setting] = field(default_factory=list)
    idle: dict[str, list[str]] = field(default_factory=dict)  # keys by why they have no effect

    def flag(self, key: str, name: str, value: Any) -> None:
        self.settings.append(Setting(name, value, f"{self.path}: {key}"))

    def without(self, key: str, why: str) -> None:
        self.idle.setdefault(why, []).append(key)

    def refuse(self, key: str, value: Any, instead: str) -> None:
        raise UserError(
            f"{self.path}: {key}={json.dumps(value, ensure_ascii=False)} has no counterpart here: "
            f"{instead}; change it in a copy of the file"
        )


def settings(path: str) -> list[Setting]:
    """Return the flags that a ``config.json`` of MindIE sets.

    Raises:
        UserError: the file cannot be read, is not MindIE's, has an unknown key, or one at a value
            that has no counterpart.
    """
    return _read(Path(path)).settings


def without_effect(path: str) -> Iterator[str]:
    """Yield lines about the keys of such a file that have no effect here, and why."""
    for why, keys in _read(Path(path)).idle.items():
        yield f"{path}: without effect: {', '.join(keys)} ({why})"


def _read(path: Path) -> _Found:
    content = _content(path)
    found = _Found(path)
    _section(found, "", content, _TOP)
    for name in _part(found, content, "LogConfig"):
        found.without(f"LogConfig.{name}", _LOGS.why)
    server = _part(found, content, "ServerConfig")
    backend = _part(found, content, "BackendConfig")
    deploy = _part(found, backend, "ModelDeployConfig", "BackendConfig.")
    schedule = _part(found, backend, "ScheduleConfig", "BackendConfig.")
    _section(found, "ServerConfig.", server, _SERVER, (*_OF_OTHER_PORTS, *_OF_CLUSTERS))
    _section(found, "BackendConfig.", backend, _BACKEND, _OF_CLUSTERS)
    _section(found, "ModelDeployConfig.", deploy, _DEPLOY)
    _section(found, "ScheduleConfig.", schedule, _SCHEDULE)
    _model(found, deploy)
    _addresses(found, server)
    _queue(found, server, schedule)
    _tls(found, server)
    if schedule.get("supportSelectBatch"):
        for name in ("prefillTimeMsPerReq", "decodeTimeMsPerReq"):
            found.without(f"ScheduleConfig.{name}", _STEPS)
    return found


def _content(path: Path) -> dict[str, Any]:
    try:
        content = jsonl.parse(path.read_bytes())
    except (OSError, DataError) as error:
        raise UserError(f"config={path} cannot be read: {error}") from error
    if isinstance(content, dict) and ("ModelDeployParam" in content or "OtherParam" in content):
        raise UserError(
            f"config={path} is of MindIE 1.0.RC2 or older; write its values into the config.json "
            "of a newer version, which has ServerConfig and BackendConfig"
        )
    if not isinstance(content, dict) or "ServerConfig" not in content:
        raise UserError(
            f"config={path} is not MindIE's: it has no ServerConfig; a file of this server's own "
            "flags comes first on the command line: server.py FILE.yaml"
        )
    return content


def _part(found: _Found, content: Mapping[str, Any], name: str, above: str = "") -> dict[str, Any]:
    part = content.get(name, {})
    if not isinstance(part, dict):
        raise UserError(f"{found.path}: {above}{name} has to be an object, not {part!r:.40}")
    return part


def _section(
    found: _Found,
    above: str,
    content: Mapping[str, Any],
    keys: Mapping[str, _Key],
    others: tuple[str, ...] = (),
) -> None:
    """Read a section; keys that begin like one of ``others`` are read elsewhere."""
    for name, value in content.items():
        if name.startswith(others):
            continue
        key = keys.get(name)
        if key is None:
            near = near_name(name, keys)
            hint = f"; did you mean {near!r}?" if near else "; take it out of a copy of the file"
            raise UserError(f"{found.path}: unknown {above + name!r}{hint}")
        if isinstance(key, Becomes):
            found.flag(above + name, key.flag, _converted(found, above + name, key, value))
        elif isinstance(key, Only) and not is_value(value, *key.values):
            found.refuse(above + name, value, key.instead)
        elif isinstance(key, Idle) and not is_value(value, *key.usual):
            found.without(above + name, key.why)


def _converted(found: _Found, name: str, key: Becomes, value: Any) -> Any:
    try:
        return key.convert(value)
    except (TypeError, ValueError):
        raise UserError(f"{found.path}: {name}={value!r} is not a whole number") from None


def _model(found: _Found, deploy: Mapping[str, Any]) -> None:
    """Read the one model, its plugins and its adapters."""
    models = deploy.get("ModelConfig", [{}])
    if not isinstance(models, list) or len(models) != 1 or not isinstance(models[0], dict):
        raise UserError(
            f"{found.path}: ModelDeployConfig.ModelConfig has to be a list of one model; start a "
            "server for each"
        )
    model = models[0]
    _section(found, "ModelConfig.", model, _MODEL)
    wanted, processes = model.get("worldSize", 1), launched()
    if wanted != processes:
        found.without(
            "ModelConfig.worldSize",
            f"it is {wanted}, and {processes} launched; start {wanted} with python -m "
            f"paddle.distributed.launch --nproc_per_node {wanted} server.py ...",
        )
    _plugins(found, model.get("plugin_params") or "{}")
    if modules := deploy.get("LoraModules"):
        found.flag("ModelDeployConfig.LoraModules", "adapters", _adapters(found, modules, model))


def _plugins(found: _Found, text: Any) -> None:
    key = "ModelConfig.plugin_params"
    try:
        params = jsonl.parse(str(text).encode())
    except DataError:
        params = None
    if not isinstance(params, dict):
        raise UserError(f"{found.path}: {key}={text!r} is not the JSON of an object")
    names = [name for name in str(params.get("plugin_type", "")).split(",") if name]
    for name in names:
        if name not in _PLUGINS:
            known = ", ".join(_PLUGINS)
            found.refuse(key, name, f"the plugins that have one are {known}")
        if _PLUGINS[name]:
            found.without(f"{key} {name}", _PLUGINS[name])


def _adapters(found: _Found, modules: Any, model: Mapping[str, Any]) -> list[str]:
    """Return ``NAME=DIR`` of each adapter."""
    base = model.get("modelName")
    words = []
    for number, module in enumerate(modules if isinstance(modules, list) else [None]):
        key = f"LoraModules.{number}"
        if not isinstance(module, dict) or {"name", "path"} - module.keys():
            raise UserError(f"{found.path}: {key} has to be an object with name and path")
        if unknown := module.keys() - {"name", "path", "baseModelName"}:
            raise UserError(f"{found.path}: unknown '{key}.{min(unknown)}'")
        if module.get("baseModelName", base) != base:
            found.refuse(f"{key}.baseModelName", module["baseModelName"], f"the model is {base}")
        words.append(f"{module['name']}={module['path']}")
    return words


def _addresses(found: _Found, server: Mapping[str, Any]) -> None:
    """Read what hangs on the addresses: metrics and management share a port here."""
    for name in ("ipAddress", "managementIpAddress"):
        if server.get(name) in ("0.0.0.0", "::") and not server.get("allowAllZeroIpListening"):
            found.refuse(
                f"ServerConfig.{name}",
                server[name],
                "allowAllZeroIpListening is not true, so every address may not be listened on",
            )
    port, metrics = server.get("managementPort"), server.get("metricsPort")
    if port is None and metrics is not None:
        found.flag("ServerConfig.metricsPort", "management_port", metrics)
    elif metrics != port and metrics is not None:
        found.without("ServerConfig.metricsPort", "metrics are answered on managementPort")
    asked = port is not None or metrics is not None
    if asked and "ipAddress" in server and "managementIpAddress" not in server:
        found.flag("ServerConfig.ipAddress", "management_host", server["ipAddress"])


def _queue(found: _Found, server: Mapping[str, Any], schedule: Mapping[str, Any]) -> None:
    """MindIE answers ``maxLinkNum`` requests and lets twice as many wait."""
    links = server.get("maxLinkNum")
    if links is None:
        return
    running = schedule.get("maxBatchSize", 0)
    for key, value in (
        ("ServerConfig.maxLinkNum", links),
        ("ScheduleConfig.maxBatchSize", running),
    ):
        if type(value) is not int:
            raise UserError(f"{found.path}: {key}={value!r} is not a whole number")
    waiting = 3 * links - running
    found.flag("ServerConfig.maxLinkNum", "max_queue", max(0, min(waiting, MAX_QUEUE)))
    if waiting > MAX_QUEUE:
        found.without("ServerConfig.maxLinkNum", f"above {MAX_QUEUE} requests that wait")


def _tls(found: _Found, server: Mapping[str, Any]) -> None:
    """Read the files of TLS; their paths begin at MindIE's directory, the one above ``conf``."""
    enabled = server.get("httpsEnabled")
    if type(enabled) is not bool:
        raise UserError(
            f"{found.path}: ServerConfig.httpsEnabled has to say true or false, not {enabled!r}"
        )
    if not enabled:
        return
    above = found.path.resolve().parent
    root = above.parent if above.name == "conf" else above
    for key, name, folder, usual in (
        # Where MindIE looks if the file does not say; without them there would be no TLS.
        ("tlsCert", "ssl_certfile", "", "security/certs/server.pem"),
        ("tlsPk", "ssl_keyfile", "", "security/keys/server.key.pem"),
        ("tlsCaFile", "ssl_ca_certs", "tlsCaPath", None),
        ("tlsCrlFiles", "ssl_crl", "tlsCrlPath", None),
    ):
        value = server.get(key) or usual
        files = [value] if isinstance(value, str) else value or []
        if not isinstance(files, list) or not all(isinstance(one, str) for one in files):
            raise UserError(f"{found.path}: ServerConfig.{key}={value!r} has to name files")
        if len(files) > 1:
            found.refuse(f"ServerConfig.{key}", files, "one file holds all: join them with cat")
        if files:
            place = root / str(server.get(folder, "")) / files[0]
            found.flag(f"ServerConfig.{key}", name, str(place))
        if files and name == "ssl_ca_certs":
            found.flag(f"ServerConfig.{key}", "no_ui", True)  # a page has no certificates to show
    for key in server:
        if key.startswith(_OF_OTHER_PORTS):
            found.without(f"ServerConfig.{key}", "one certificate serves all ports")
        elif key in ("tlsPkPwd", "kmcKsfMaster", "kmcKsfStandby"):
            found.without(f"ServerConfig.{key}", "the private key has to be without a password")
