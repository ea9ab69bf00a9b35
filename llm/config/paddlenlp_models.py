"""PaddleNLP's settings of trained models as ours: quantizing, merging, exporting, answering.

From ``llm/predict/predictor.py``, ``export_model.py``, ``flask_server.py``, from
``llm/tools/merge_lora_params.py``, and from ``run_finetune.py`` with do_ptq or do_gptq.
"""

from typing import Any

from common.errors import UserError
from common.foreign import Becomes, Idle, Only, Program, Row, Sets, Settings, Told, is_value
from llm.config.paddlenlp_training import NAME, without

_NOTHING = (False, None, "")
_STATIC_PREFIX = "model"  # model_prefix there, where it is not given
_BATCH = 8  # per_device_train_batch_size there
_ENGINE = "the engine's only form has paged attention and continuous batching"
_LATER = "quantize_generation.py makes a directory of integers, which says so itself"


def _cache_type(value: Any, beside: Settings) -> Settings:
    if is_value(value, None, "", "fp16") or is_value(beside.get("mode"), "static"):
        return {}
    if not is_value(value, "dynamic", "static", "int8"):
        raise UserError(f"a cache of {value} is not there; cache_dtype is auto, bfloat16 or int8")
    return {"cache_dtype": "int8"}


def _dtype(value: Any, beside: Settings) -> Settings | Told:
    if is_value(beside.get("mode"), "static"):
        return Told({}, "an exported program has its own type")
    return {"dtype": value}


def _speculation(value: Any, beside: Settings) -> Settings:
    if is_value(value, None, ""):
        return {}
    if not is_value(value, "inference_with_reference"):
        raise UserError(
            f"speculate_method={value} has no counterpart here: inference_with_reference has, and "
            "draft_model_name_or_path, a smaller model with the same tokenizer"
        )
    return {"prompt_lookup_num_tokens": beside.get("speculate_max_draft_token_num", 1)}


_COMMON: dict[str, Row] = {
    "inference_model": Idle(_ENGINE, (False,)),
    "block_attn": Idle(_ENGINE, (False,)),
    "append_attn": Idle(_ENGINE, (False,)),
    "use_flash_attention": Idle("--ops chooses kernels", (False,)),
    "quant_type": Only(_NOTHING, _LATER),
    "cachekv_int8_type": Sets(_cache_type, "`cache_dtype: int8`"),
    "avx_model": Idle("on CPUs the native ops compute", (False,)),
    "avx_type": Becomes(
        "dtype",
        values={"bf16": "bfloat16", "none": None},
        refused=dict.fromkeys(("fp16", "fp16_int8"), "a CPU computes in float32 or bfloat16"),
    ),
    "avx_cachekv_type": Sets(_cache_type, "`cache_dtype: int8`"),
    "use_fake_parameter": Only(_NOTHING, "weights are read from files"),
    "model_type": Idle("config.json says it", (None, "")),
    "export_precache": Idle("a prefix's keys and values are the engine's", (False,)),
    "reft": Only(_NOTHING, "adapters are LoRA and prefixes"),
    "reft_path": Only((None,), "adapters are LoRA and prefixes"),
    "return_full_hidden_states": Only((False, 0), "evaluate_generation.py scores text"),
}


def _mode(value: Any, _: Settings) -> Settings:
    if not is_value(value, "dynamic", "static"):
        raise UserError(f"mode={value} is neither dynamic nor static")
    return {}


def _place(value: Any, beside: Settings) -> Settings:
    if not is_value(beside.get("mode"), "static"):
        return {"model_name_or_path": value}
    return {"model_dir": value, "model_prefix": beside.get("model_prefix", _STATIC_PREFIX)}


# Of predictor.py and flask_server.py: a model or a program is opened.
_OPENED: dict[str, Row] = {
    "mode": Sets(_mode, "which of `model_name_or_path` and `model_dir` is meant"),
    "model_name_or_path": Sets(_place, "`model_dir` with `mode: static`"),
    "dtype": Sets(_dtype, "`dtype`, without effect with `mode: static`"),
    "speculate_method": Sets(_speculation, "`prompt_lookup_num_tokens`"),
    "speculate_max_draft_token_num": Sets(
        lambda value, beside: {}, "`prompt_lookup_num_tokens`, with speculate_method"
    ),
    **without(
        (
            *("speculate_max_ngram_size", "speculate_verify_window"),
            "speculate_max_candidate_len",
        ),
        "how guesses are looked up is the engine's",
    ),
    "draft_model_quant_type": Only(_NOTHING, _LATER),
    "block_size": Idle("blocks of the cache have 16 tokens"),
}


WEIGHTS = Program(NAME, _COMMON)
OPENED = Program(NAME, _OPENED)
PREDICT = Program(
    NAME,
    {
        "benchmark": Only(_NOTHING, "benchmarks/ measures"),
        "min_length": Only((0, 1), "answers end where the model ends them; --ignore_eos"),
        "total_max_length": Idle("a prompt and its answer may have what the context holds"),
    },
    defaults={"decode_strategy": "sampling", "max_length": 1024},
)
_ASKED = "requests say it"
SERVE = Program(
    NAME,
    {
        **without(("top_k", "top_p", "temperature", "repetition_penalty"), _ASKED),
        **without(("min_length", "decode_strategy"), _ASKED),
        **without(("data_file", "output_file", "benchmark"), "answers go to who asks", None, False),
        "batch_size": Becomes("max_num_seqs"),
        "base_port": Becomes("flask_port"),
        "sub_title": Idle("the page has a title"),
        "total_max_length": Becomes("max_model_len"),
    },
)


def _output_path(value: Any, beside: Settings) -> Settings:
    """There a directory; here the program's files without their endings."""
    if not {"inference_model", "model_prefix", "block_attn", "append_attn"} & beside.keys():
        return {"output_path": value}
    return {"output_path": f"{str(value).rstrip('/')}/{beside.get('model_prefix', _STATIC_PREFIX)}"}


_ALONE = "an exported program has no lengths but max_model_len, and no sampling"
EXPORT = Program(
    NAME,
    {
        "output_path": Sets(
            _output_path,
            "`output_path`: the files' beginning, there the directory; with a setting of "
            "PaddleNLP's beside it, `/model` is added",
        ),
        "model_prefix": Sets(lambda value, beside: {}, "the end of `output_path`"),
        "mode": Only(("dynamic",), "infer_generation.py runs exported programs"),
        "total_max_length": Becomes("max_model_len"),
        **without(("src_length", "max_length", "min_length", "batch_size"), _ALONE),
        **without(("top_k", "top_p", "temperature"), _ALONE),
        **without(("repetition_penalty", "decode_strategy"), _ALONE),
        **without(("data_file", "output_file", "benchmark"), _ALONE, None, False),
        "speculate_method": Only(_NOTHING, "infer_generation.py takes prompt_lookup_num_tokens"),
    },
)
MERGE = Program(
    NAME,
    {
        **dict.fromkeys(
            ("output_path", "merge_lora_model_path", "merge_model_path"), Becomes("output_dir")
        ),
        "safe_serialization": Idle("weights are always safetensors", (True,)),
        "low_gpu_mem": Idle("one matrix is merged at a time", (False,)),
        "copy_tokenizer": Only((True,), "the tokenizer goes with the model"),
    },
)
CONVERT = Program(
    NAME,
    without(("tp", "pp"), "the files say how they are split")
    | without(("device",), "files are converted on the CPU"),
)

_KINDS = {
    **dict.fromkeys(("a8w8", "w8a8", "a8w8c8", "w8a8c8"), "A8W8"),
    **dict.fromkeys(("weight_only_int8", "wint8", "w8a16"), "W8"),
    **dict.fromkeys(("weight_only_int4", "wint4", "w4a16"), "W4"),
}
_FP8 = "weights of 8 bits are integers: A8W8"


def _kind(beside: Settings) -> str:
    """What PaddleNLP would quantize to: A8W8 where nothing is said."""
    if is_value(beside.get("do_gptq"), True):
        return "W4"
    asked = str(beside.get("quant_type", "a8w8")).lower()
    return _KINDS.get(asked, asked.upper())


def _looks_at_text(beside: Settings) -> bool:
    return any(is_value(beside.get(name), True) for name in ("do_gptq", "do_awq", "smooth"))


def _ptq(value: Any, beside: Settings) -> Settings:
    if not is_value(value, True):
        return {}
    kind = _kind(beside)
    return {"quant_type": kind, **({"method": "rtn"} if kind.endswith("4") else {})}


def _gptq(value: Any, _: Settings) -> Settings:
    found = {"quant_type": "W4", "method": "gptq", "scaling": "none"}
    return found if is_value(value, True) else {}


def _examples(value: Any, beside: Settings) -> Settings:
    theirs = {"do_ptq", "do_gptq"} & beside.keys()
    return {"dataset_path": value} if not theirs or _looks_at_text(beside) else {}


def _steps(value: Any, beside: Settings) -> Settings:
    """Steps of batches there, rows of text here."""
    if not _looks_at_text(beside):
        return {}
    batch = beside.get("per_device_train_batch_size", _BATCH)
    return {"calibration_samples": int(value) * int(batch)}


def _steps_of(method: str) -> Sets:
    def make(value: Any, beside: Settings) -> Settings:
        return _steps(value, beside) if is_value(beside.get(method), True) else {}

    return Sets(make, f"`calibration_samples`, times per_device_train_batch_size, with {method}")


def _smooth(value: Any, beside: Settings) -> Settings:
    """There a switch, which AWQ's search has too; here the share of outliers, or a search."""
    if not is_value(value, True, False) or str(value) in ("0", "1"):
        return {"smooth": value}
    if is_value(value, False):
        return {}
    return {"smooth": 0.5} if _kind(beside).startswith("A8") else {"scaling": "search"}


def _length(value: Any, beside: Settings) -> Settings:
    return {"calibration_length": value} if _looks_at_text(beside) else {}


_SEARCH = "outliers are moved by one share for all linears; --scaling search looks for one each"
_CLIP = "ranges are not clipped"
_ROUNDED = "activations are rounded for each token while running, so nothing is calibrated"

QUANTIZE = Program(
    NAME,
    {
        "do_ptq": Sets(
            _ptq, "`quant_type`: A8W8 where none is given; of 4 bits with `method: rtn`"
        ),
        "do_gptq": Sets(_gptq, "`quant_type: W4`, `method: gptq` and `scaling: none`"),
        "do_qat": Only(_NOTHING, "finetune_generation.py --qat true"),
        "quant_type": Becomes(
            "quant_type", values=_KINDS, refused=dict.fromkeys(("a8w8_fp8", "a8w8c8_fp8"), _FP8)
        ),
        **dict.fromkeys(("use_fp8", "fp8_type"), Only(_NOTHING, _FP8)),
        "dataset_name_or_path": Sets(_examples, "`dataset_path`, where text is looked at"),
        "task_name_or_path": Sets(_examples, "`dataset_path`, where text is looked at"),
        "ptq_step": _steps_of("do_ptq"),
        "gptq_step": _steps_of("do_gptq"),
        "max_length": Sets(_length, "`calibration_length`, where text is looked at"),
        "src_length": Idle("calibration text is cut into rows of one length"),
        "smooth": Sets(_smooth, "`smooth: 0.5`, for weights alone `scaling: search`"),
        **without(
            (
                *("smooth_all_linears", "smooth_sampler", "smooth_step", "smooth_k_piece"),
                *("smooth_piecewise_search", "smooth_search_piece", "search_alpha_min"),
                *("search_alpha_max", "search_scale_min", "search_scale_max"),
            ),
            _SEARCH,
            False,
        ),
        "do_awq": Sets(
            lambda value, beside: {"scaling": "search"} if is_value(value, True) else {},
            "`scaling: search`",
        ),
        "awq_step": Idle(_SEARCH),
        "auto_clip": Idle(_CLIP, (False,)),
        "autoclip_step": Idle(_CLIP),
        "shift": Only(_NOTHING, "smooth: 0.5 evens out activations"),
        **without(("shift_all_linears", "shift_sampler", "shift_step"), "of shift"),
        "weight_quant_method": Idle(
            "weights of 8 bits have a scale for each output, of 4 bits for each group: group_size"
        ),
        **without(("act_quant_method",), _ROUNDED),
        "cachekv_quant_method": Idle("--cache_dtype int8, where the model is opened"),
        "skip_list_names": Only(([], None), "all linears of the layers are rounded"),
        "load_quant_model": Only(_NOTHING, "evaluate_generation.py measures the result"),
        **without(("do_quant_debug", "test_sample"), "predict_generation.py asks it", None, False),
        "do_eval": Idle("--eval_file measures perplexity before and after", (False,)),
        "eval_with_do_generation": Only(_NOTHING, "evaluate_generation.py scores answers"),
        **without(
            ("bf16", "fp16", "fp16_opt_level"), "what is not rounded keeps its type in the files"
        ),
        "per_device_train_batch_size": Idle("rows of calibration text run one by one"),
        **without(
            ("per_device_eval_batch_size", "eval_accumulation_steps"), "nothing is evaluated"
        ),
        "unified_checkpoint": Idle("the result is one model directory"),
        **without(("lazy", "zero_padding", "flash_mask"), "text is cut into full rows"),
    },
)
