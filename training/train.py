"""Trains the bundled model: ``python -m training.train --run training/runs/fifth``; run it again to go on."""

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from training.answers import Example
from training.curriculum import Examples
from training.growth import deepened
from training.model import MasterWeights, build
from training.stages import STAGES
from training.tokenizer import END, JOURNAL, example_text, load_tokenizer, sentence_ends

# Move on when the mean answer loss of the last steps is below this; the last stage never ends by itself.
ADVANCE = (0.4, 0.25, 0.3, 0.32, 0.34)
# and the probe finds the right sentence with a loss (nats a sentence) below this; by chance it is about 0.5.
CHOSEN = (9.9, 0.5, 0.5, 0.45, 0.42)
LONGEST = 900
POOL = 8
DECISIVE = 3.0
# The probe reads, this many layers below the top, whether a sentence answers the question; its loss has this weight.
PROBED_BELOW = 2
MATCHED_LAYER = 2
PROBE = 0.5


@dataclass(slots=True)
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    loss: float = 10.0
    choice: float = 0.7
    match: float = 0.7
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids (rows, tokens), right-padded; the flat positions that an answer token follows, and that token."""

    ids: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    ends: torch.Tensor
    holds: torch.Tensor
    asked: torch.Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One example in token ids; `ends` are (position of a sentence's last token, whether that sentence answers)."""

    prompt: list[int]
    answer: list[int]
    ends: list[tuple[int, bool]]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def _encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> list[Row]:
    texts = [example_text(example) for example in examples]
    prompts = tokenizer([p for p, _ in texts], add_special_tokens=False, return_offsets_mapping=True)
    answers = tokenizer([a for _, a in texts], add_special_tokens=False)["input_ids"]
    rows = []
    for index, (example, (text, _)) in enumerate(zip(examples, texts, strict=True)):
        ends = [(prompts.char_to_token(index, at), holds) for at, holds in sentence_ends(example, text)]
        rows.append(
            Row(
                prompts["input_ids"][index],
                answers[index],
                [(at, holds) for at, holds in ends if at is not None],
            )
        )
    return [row for row in rows if len(row) <= LONGEST]


def _asked(prompt: list[int], journal: int) -> list[float]:
    """Marks each token of the entries: 1 if the question holds it, else 0; -1 outside the entries."""
    if journal not in prompt:
        return [-1.0] * len(prompt)
    start = prompt.index(journal)
    stop = start + 1 + prompt[start + 1 :].index(journal)
    question = set(prompt[:start])
    inside = [float(token in question) for token in prompt[start + 1 : stop]]
    return [-1.0] * (start + 1) + inside + [-1.0] * (len(prompt) - stop)


def collate(rows: list[Row], pad: int, journal: int) -> Batch:
    """Pads the rows on the right, to a multiple of 8 tokens: causal attention needs no mask then."""
    width = -(-max(len(row) - 1 for row in rows) // 8) * 8
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    where: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    ends: list[tuple[int, bool]] = []
    asked = torch.full((len(rows), width), -1.0)
    for index, row in enumerate(rows):
        ids[index, : len(row) - 1] = torch.tensor(row.prompt + row.answer[:-1])
        start, count = index * width + len(row.prompt) - 1, len(row.answer)
        where.extend(range(start, start + count))
        targets.extend(row.answer)
        # The first tokens choose the sentence and the last ones the entry; those between only copy.
        weights.extend(DECISIVE if at < 6 or at >= count - 5 else 1.0 for at in range(count))
        asked[index, : len(row.prompt)] = torch.tensor(_asked(row.prompt, journal))
        ends.extend((index * width + at, holds) for at, holds in row.ends)
    at, holds = (
        torch.tensor([at for at, _ in ends], dtype=torch.long),
        torch.tensor([float(holds) for _, holds in ends]),
    )
    return Batch(
        ids,
        torch.tensor(where),
        torch.tensor(targets),
        torch.tensor(weights),
        at,
        holds,
        asked.view(-1),
    )


def batches(tokenizer: PreTrainedTokenizerFast, stage: int, seed: int, tokens: int) -> Iterator[Batch]:
    """Yields batches of about `tokens` tokens each, rows of like length together, drawn from `seed`."""
    rng, examples = random.Random(seed), Examples(seed)
    while True:
        rows: list[Row] = []
        while sum(map(len, rows)) < tokens * POOL:
            rows += _encode(tokenizer, [examples.draw(stage) for _ in range(64)])
        rows.sort(key=len)
        groups: list[list[Row]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * len(row) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(JOURNAL))


@dataclass(frozen=True, slots=True)
class Losses:
    """What is minimized, the plain mean over the answers' tokens (nats), and the probe's (nats a sentence)."""

    total: torch.Tensor
    answer: torch.Tensor
    choice: torch.Tensor
    match: torch.Tensor


def _probed(
    probe: torch.nn.Linear, hidden: torch.Tensor, column: int, where: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Returns the mean loss of the probe's yes or no at the flat positions `where`; 0 where there are none."""
    if not len(where):
        return hidden.sum() * 0
    seen = hidden.flatten(0, 1)[where].float()  # (positions, width)
    seen = seen * torch.rsqrt(seen.square().mean(-1, keepdim=True) + 1e-5)
    return binary_cross_entropy_with_logits(probe(seen)[:, column], labels)


def losses(model: LlamaForCausalLM, probe: torch.nn.Linear, batch: Batch) -> Losses:
    """Returns the losses of a batch.

    The probes ask two layers up whether a token is in the question, and two from the top, at the end of each sentence,
    whether this sentence answers: a signal for choosing that the answer gives only once everything else works.
    """
    out = model.model(input_ids=batch.ids, use_cache=False, output_hidden_states=True)
    logits = model.lm_head(out.last_hidden_state.flatten(0, 1)[batch.where])  # (answer tokens, vocabulary)
    each = cross_entropy(logits.float(), batch.targets, reduction="none")
    choice = _probed(probe, out.hidden_states[-1 - PROBED_BELOW], 0, batch.ends, batch.holds)
    inside = (batch.asked >= 0).nonzero()[:, 0]
    match = _probed(probe, out.hidden_states[MATCHED_LAYER], 1, inside, batch.asked[inside])
    weighted = (each * batch.weights).sum() / batch.weights.sum()
    return Losses(
        weighted + PROBE * (choice + match),
        each.detach().mean(),
        choice.detach(),
        match.detach(),
    )


def scale(step: int, steps: int, decay: int, warmup: int = 100) -> float:
    """Returns the learning rate's share of its peak: warm-up, plateau, then a straight line down to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.02, min(1.0, (steps - step) / max(decay, 1)))


def save(path: Path, rank: int, weights: MasterWeights, progress: Progress) -> None:
    """Writes a checkpoint whole or not at all; every worker must call it, and the first one writes."""
    state = weights.state()
    if rank == 0:
        partial = path.with_suffix(".partial")
        torch.save({"progress": asdict(progress), **state}, partial)
        partial.replace(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("training/runs/fifth"))
    parser.add_argument("--steps", type=int, default=12_000, help="total, over all resumed parts")
    parser.add_argument(
        "--decay",
        type=int,
        default=2_000,
        help="steps at the end over which the learning rate falls",
    )
    parser.add_argument("--peak", type=float, default=1.0, help="factor on both learning rates")
    parser.add_argument("--tokens", type=int, default=3_072, help="per batch and worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes of one thread each that share every batch",
    )
    parser.add_argument(
        "--start",
        type=Path,
        help="an exported model, of as many layers or fewer, that a new run begins with in the last stage",
    )
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    return parser.parse_args()


def main() -> None:
    """Trains from the last checkpoint of the run, or from the seed."""
    args = _arguments()
    args.run.mkdir(parents=True, exist_ok=True)
    if args.start and not (args.run / "tokenizer").exists():
        (args.run / "tokenizer").mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(args.start / name, args.run / "tokenizer")
    load_tokenizer(args.run / "tokenizer", args.seed)
    # One meeting a step instead of one per operation: on busy cores two single-threaded processes beat two threads.
    if args.workers > 1:
        mp.spawn(_work, args=(args,), nprocs=args.workers)
    else:
        _work(0, args)


def _work(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if args.workers > 1:
        store = dist.FileStore(str(args.run / f"meeting-{os.getppid()}"), args.workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=args.workers)
    tokenizer = load_tokenizer(args.run / "tokenizer")
    model = build(
        len(tokenizer),
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.convert_tokens_to_ids(END),
    )
    progress, checkpoint = Progress(), args.run / "checkpoint.pt"
    if args.start and not checkpoint.is_file():
        trained = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        model.load_state_dict(deepened(trained.state_dict(), model.config.num_hidden_layers))
        progress.stage = len(STAGES) - 1
    weights = MasterWeights(model, rank, args.workers)
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        weights.restore(saved, rank)
        progress = Progress(**saved["progress"])
        print(f"resumed at step {progress.step}, stage {progress.stage}", flush=True)
    model.set_attn_implementation("packed_attention")
    model.train()
    _loop(rank, args, tokenizer, weights, progress)


def _share(weights: MasterWeights, means: torch.Tensor, workers: int) -> list[float]:
    """Averages the gradients and `means` over the workers; returns the latter."""
    if workers == 1:
        return means.tolist()
    parameters = weights.parameters()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    flat = torch.cat([means, *(p.grad.float().view(-1) for p in parameters)])
    dist.all_reduce(flat)
    flat /= workers
    offset = len(means)
    for parameter in parameters:
        parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()
    return flat[: len(means)].tolist()


def _source(
    rank: int,
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
) -> Iterator[Batch]:
    # A resumed run draws fresh data: its seed depends on the step it resumes from.
    seed = args.seed * 1_000_003 + progress.step * 64 + progress.stage * 16 + rank
    return batches(tokenizer, progress.stage, seed, args.tokens)


def _log(path: Path, progress: Progress, rate: float) -> None:
    """Adds the run's figures to its curve and prints them; the loss is a running mean over about 30 steps."""
    line = json.dumps(
        {
            **asdict(progress),
            "loss": round(progress.loss, 4),
            "choice": round(progress.choice, 4),
            "rate": round(rate, 4),
        }
    )
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def _ready(progress: Progress) -> bool:
    return progress.loss < ADVANCE[progress.stage] and progress.choice < CHOSEN[progress.stage]


def _loop(
    rank: int,
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerFast,
    weights: MasterWeights,
    progress: Progress,
) -> None:
    source, mark = _source(rank, args, tokenizer, progress), time.monotonic()
    parent = os.getppid()
    while progress.step < args.steps and (args.workers == 1 or os.getppid() == parent):
        batch = next(source)
        rate = args.peak * scale(progress.step, args.steps, args.decay)
        loss = losses(weights.model, weights.probe, batch)
        loss.total.backward()
        value, choice, match = _share(weights, torch.stack([loss.answer, loss.choice, loss.match]), args.workers)
        progress.choice += 0.05 * (choice - progress.choice)
        progress.match += 0.05 * (match - progress.match)
        weights.step(rate)
        progress.loss += 0.03 * (value - progress.loss) if progress.stage_step else value - progress.loss
        progress.step, progress.stage_step = progress.step + 1, progress.stage_step + 1
        progress.tokens += args.workers * batch.ids.numel()
        now = time.monotonic()
        progress.seconds, mark = progress.seconds + now - mark, now
        if rank == 0 and progress.step % args.log_every == 0:
            _log(args.run / "curve.jsonl", progress, rate)
        if progress.stage < len(STAGES) - 1 and progress.stage_step >= 50 and _ready(progress):
            progress.stage, progress.stage_step = progress.stage + 1, 0
            source = _source(rank, args, tokenizer, progress)
        if progress.step % args.save_every == 0 or progress.step == args.steps:
            save(args.run / "checkpoint.pt", rank, weights, progress)


if __name__ == "__main__":
    main()
