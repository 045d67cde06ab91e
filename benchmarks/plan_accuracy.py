"""How exact a plan is: predicted peak memory beside the measured one, and beside what other tools predict.

    uv run python -m benchmarks.plan_accuracy                  # main memory, and the simulated accelerator
    uv run python -m benchmarks.plan_accuracy --device cuda:0  # main memory, and a real GPU
    uv run python -m benchmarks.plan_accuracy --only llama --only gemma2

Sixteen architectures of 40 to 200 million random weights, three loaded forms, three contexts. In main memory each case
has a process of its own. Every case loads, runs a prompt that fills the context but for 4 tokens, and those 4. With
`--json FILE` every case is written down as it ends, and a run that was stopped goes on behind the last one.

Main memory is the growth of private pages (`RssAnon`) at its most, after the frameworks were warmed up: with the stored
dtype it holds no weights, which are a map of the file. An accelerator's memory is its allocator's own count.

Beside it stands what transformers' automatic device map budgets for the same model (the weights), and what
`accelerate estimate-memory` prints as its total for that dtype.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTEXTS = (512, 1536, 3072)
FORMS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {"dtype": "float32"},
    "4bit": {"load_in_4bit": True},
}
_SHAPE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 4}
_HALF: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 512}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
_GEMMA: dict[str, Any] = {
    **_GROUPED,
    **_HALF,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "tie_word_embeddings": True,
}
_NAMED_AS_GPT2: dict[str, Any] = {"n_layer": 4, "n_head": 12, "vocab_size": 32000, "tie_word_embeddings": True}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 12,
    "kv_lora_rank": 128,
    "q_lora_rank": 192,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
_ROUTED: dict[str, Any] = {
    **_EXPERTS,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_FOUR_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 512}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 64}),
    "phi3": ("phi3", _GROUPED),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "gpt2": ("gpt2", {**_NAMED_AS_GPT2, "n_embd": 768, "n_positions": 4096}),
    "gpt-neox": ("gpt_neox", _SHAPE),
    "opt": ("opt", {**_SHAPE, "ffn_dim": 3072, "word_embed_proj_dim": 768}),
    "bloom": ("bloom", {**_NAMED_AS_GPT2, "hidden_size": 768}),
    "mixtral": ("mixtral", {**_GROUPED, **_FOUR_EXPERTS, "sliding_window": None}),
    "qwen3-moe": ("qwen3_moe", {**_GROUPED, **_EXPERTS, "head_dim": 64}),
    "gpt-oss": ("gpt_oss", {**_GROUPED, **_HALF, **_FOUR_EXPERTS, "head_dim": 64, "intermediate_size": 768}),
    "deepseek-v3": ("deepseek_v3", {**_SHAPE, **_LATENT, **_ROUTED}),
    "lfm2": ("lfm2", {**_GROUPED, "layer_types": ["conv", "full_attention"] * 2}),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 768,
            "num_hidden_layers": 4,
            "num_heads": 32,
            "head_dim": 48,
            "state_size": 64,
            "n_groups": 1,
            "vocab_size": 32000,
        },
    ),
}


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="sim:0", help="the accelerator: sim:0 (simulated), cuda:0, or none")
    parser.add_argument("--only", action="append", choices=list(ARCHITECTURES), help="repeatable")
    parser.add_argument("--form", action="append", choices=list(FORMS), help="instead of the three; repeatable")
    parser.add_argument("--context", action="append", type=int, help="instead of the three; repeatable")
    parser.add_argument("--json", type=Path, help="a case a line goes here; cases that are there are not run again")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--place", action="append", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_cases(*arguments.case, arguments.place)
        return
    found = _recorded(arguments.json)
    for name in arguments.only or ARCHITECTURES:
        for form in arguments.form or FORMS:
            for places in _left(name, form, arguments, found):
                for case in _in_process(name, form, places):
                    found[_key(case)] = case
                    _record(arguments.json, case)
    print("\n".join(table(list(found.values()))))


_Key = tuple[str, str, str, int]


def _key(case: dict[str, Any]) -> _Key:
    return case["architecture"], case["form"], case["device"], case["context"]


def _recorded(record: Path | None) -> dict[_Key, dict[str, Any]]:
    if record is None or not record.exists():
        return {}
    cases = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return {_key(case): case for case in cases}


def _record(record: Path | None, case: dict[str, Any]) -> None:
    print(_line(case), file=sys.stderr, flush=True)
    if record is not None:
        with record.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(case) + "\n")


def _left(name: str, form: str, arguments: argparse.Namespace, found: dict[_Key, dict[str, Any]]) -> list[list[str]]:
    """Return device and context of the cases that are to be run, as "sim:0=512", a list for each process.

    In main memory each case has its own: what kernels keep of one would be there already for the next.
    """
    # bitsandbytes packs on CUDA and on the CPU, and on no device that it does not know.
    unpacked = arguments.device.startswith("sim") and form == "4bit"
    contexts = arguments.context or CONTEXTS
    ways = [[("cpu", context)] for context in contexts]
    if arguments.device != "none" and not unpacked:
        ways.append([(arguments.device, context) for context in contexts])
    left = ([f"{at}={context}" for at, context in way if (name, form, at, context) not in found] for way in ways)
    return [way for way in left if way]


def _in_process(name: str, form: str, places: list[str]) -> Iterator[dict[str, Any]]:
    """Yield cases as a process of their own tells them, a line each."""
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--case", name, form]
    command += [part for place in places for part in ("--place", place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise SystemExit(f"{name} {form} failed")


def run_cases(name: str, form: str, places: list[str]) -> None:
    """Print what each of `places` took, one JSON object a line."""
    directory = checkpoint(name)
    others = peers(directory, form)
    for place in places:
        device, _, context = place.partition("=")
        case = {"architecture": name, **_case(directory, form, int(context), device), **others}
        print(json.dumps(case), flush=True)


def _case(directory: Path, form: str, context: int, device: str) -> dict[str, Any]:
    with ExitStack() as stack:
        if device.startswith("sim"):
            from src.tests import simulated_accelerator

            lent = stack.enter_context(simulated_accelerator.load().lent())
            for number in range(lent.devices):
                lent.set_cap(16 * 2**30, number)
        check = _checked(directory, form, context, device)
        used = next(found for found in check.devices if found.device == device)
        return {
            "form": form,
            "context": context,
            "device": device,
            "rung": check.rung,
            "predicted": used.predicted,
            "measured": used.measured,
            "weights_predicted": used.weights_predicted,
            "weights_measured": used.weights_measured,
            "mapped": used.mapped,
            "holds": used.holds,
        }


def _checked(directory: Path, form: str, context: int, device: str) -> Any:
    from lyra_emergence.check import check_plan
    from lyra_emergence.checkpoint import read_checkpoint
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.machine import probe_machine
    from lyra_emergence.plan import make_plan

    wanted = "cpu" if device == "cpu" else "auto"
    config = ModelConfig(model_id=str(directory), context_length=context, device_map=wanted, **FORMS[form])
    plan = make_plan(config, read_checkpoint(directory), probe_machine(with_torch=True))
    return check_plan(config, directory, plan)


def peers(directory: Path, form: str) -> dict[str, int]:
    """Return the bytes that transformers' automatic map and `accelerate estimate-memory` count."""
    import torch
    from accelerate.utils import calculate_maximum_sizes, compute_module_sizes
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        full = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    # estimate-memory sums the model in float32 and divides by what the dtype is smaller.
    share = {"float32": 1, "bfloat16": 2, "4bit": 8}[form]
    total, _largest = calculate_maximum_sizes(full)
    by_layer = compute_module_sizes(model)[""] if form != "4bit" else _packed(model)
    return {"transformers": int(by_layer), "accelerate": int(total) // share}


def _packed(model: Any) -> int:
    """Return the bytes as transformers budgets packed projections: half a byte a weight."""
    import torch
    from accelerate.utils import compute_module_sizes

    special = {
        name: torch.int8
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
    }
    sizes = compute_module_sizes(model, dtype=None, special_dtypes=special)
    packed = sum(parameter.numel() for name, parameter in model.named_parameters() if name in special)
    return int(sizes[""]) - packed // 2


def checkpoint(name: str) -> Path:
    """Return the folder of an architecture's bf16 checkpoint, made on first use."""
    directory = Path(platformdirs.user_cache_dir("lyra-emergence")) / "benchmarks" / f"accuracy-{name}"
    if not (directory / "done").exists():
        _make(name, directory)
        (directory / "done").touch()
    return directory


def _make(name: str, directory: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    model_type, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)


def table(cases: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table: a row for each architecture, device and form, its contexts' figures in MiB."""
    yield "| architecture | device | form | measured | Lyra off | transformers off | accelerate off | holds |"
    yield "|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["architecture"], case["device"], case["form"]), []).append(case)
    for (name, device, form), group in groups.items():
        measured = " / ".join(_mib(case["measured"]) for case in group)
        lyra = " / ".join(_off(case, case["predicted"]) for case in group)
        transformers = " / ".join(_off(case, _peer(case, "transformers")) for case in group)
        accelerate = " / ".join(_off(case, _peer(case, "accelerate")) for case in group)
        holds = f"{sum(bool(case['holds']) for case in group)} of {len(group)}"
        yield f"| {name} | {device} | {form} | {measured} | {lyra} | {transformers} | {accelerate} | {holds} |"
    yield ""
    held = sum(bool(case["holds"]) for case in cases)
    yield f"{held} of {len(cases)} cases hold: never under, and at most 2% or 16 MiB over."


def _peer(case: dict[str, Any], peer: str) -> int:
    """Return a peer's figure for what was measured: weights that are a map of the file are not in private memory."""
    return int(case[peer]) - (int(case["mapped"]) if case["device"] == "cpu" else 0)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}"


def _off(case: dict[str, Any], predicted: int) -> str:
    return f"{(predicted - case['measured']) / 2**20:+.1f}"


def _line(case: dict[str, Any]) -> str:
    return (
        f"{case['architecture']:12} {case['device']:6} {case['form']:9} {case['context']:5} "
        f"{_mib(case['predicted']):>5} MiB predicted, {_mib(case['measured']):>5} measured, "
        f"{_off(case, case['predicted'])}{'' if case['holds'] else '  DOES NOT HOLD'}"
    )


if __name__ == "__main__":
    main()
