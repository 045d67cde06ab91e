"""Trains the bundled model: ``python -m training.train --run training/runs/first``; run it again to go on."""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from training.model import MasterWeights, build
from training.questions import STAGES, draw_example
from training.tokenizer import END, example_text, load_tokenizer

# Move on when the mean answer loss of the last steps is below this; the last stage never ends by itself.
ADVANCE = (0.4, 0.4, 0.4)
LONGEST = 900
POOL = 8


@dataclass(slots=True)
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    loss: float = 10.0
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids (rows, tokens), right-padded; the flat positions that an answer token follows, and that token."""

    ids: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor


def _encode(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    prompts = tokenizer([p for p, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([a for _, a in pairs], add_special_tokens=False)["input_ids"]
    return [(p, a) for p, a in zip(prompts, answers, strict=True) if len(p) + len(a) <= LONGEST]


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Pads the rows on the right, to a multiple of 8 tokens: causal attention needs no mask then."""
    width = -(-max(len(p) + len(a) - 1 for p, a in rows) // 8) * 8
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    where: list[int] = []
    targets: list[int] = []
    for index, (prompt, answer) in enumerate(rows):
        ids[index, : len(prompt) + len(answer) - 1] = torch.tensor(prompt + answer[:-1])
        start = index * width + len(prompt) - 1
        where.extend(range(start, start + len(answer)))
        targets.extend(answer)
    return Batch(ids, torch.tensor(where), torch.tensor(targets))


def batches(tokenizer: PreTrainedTokenizerFast, stage: int, seed: int, tokens: int) -> Iterator[Batch]:
    """Yields batches of about `tokens` tokens each, rows of like length together, drawn from `seed`."""
    rng = random.Random(seed)
    while True:
        rows: list[tuple[list[int], list[int]]] = []
        total = 0
        while total < tokens * POOL:
            fresh = _encode(tokenizer, [example_text(draw_example(rng, stage)) for _ in range(64)])
            rows += fresh
            total += sum(len(p) + len(a) for p, a in fresh)
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * (len(row[0]) + len(row[1])) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, tokenizer.pad_token_id)


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Returns the mean cross-entropy over the answers' tokens (nats)."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state  # (rows, tokens, width)
    logits = model.lm_head(hidden.flatten(0, 1)[batch.where])
    return cross_entropy(logits.float(), batch.targets)


def scale(step: int, steps: int, decay: int, warmup: int = 100) -> float:
    """Returns the learning rate's share of its peak: warm-up, plateau, then a straight line down to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.02, min(1.0, (steps - step) / max(decay, 1)))


def save(path: Path, weights: MasterWeights, progress: Progress) -> None:
    """Writes a checkpoint whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save({"progress": asdict(progress), **weights.state()}, partial)
    partial.replace(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("training/runs/first"))
    parser.add_argument("--steps", type=int, default=12_000, help="total, over all resumed parts")
    parser.add_argument("--decay", type=int, default=2_000, help="steps at the end over which the learning rate falls")
    parser.add_argument("--peak", type=float, default=1.0, help="factor on both learning rates")
    parser.add_argument("--tokens", type=int, default=3_072, help="per batch and worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each that share every batch")
    parser.add_argument("--save-every", type=int, default=100)
    return parser.parse_args()


def main() -> None:
    """Trains from the last checkpoint of the run, or from the seed."""
    args = _arguments()
    args.run.mkdir(parents=True, exist_ok=True)
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
    model = build(len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(END))
    weights, progress, checkpoint = MasterWeights(model), Progress(), args.run / "checkpoint.pt"
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        weights.restore(saved)
        progress = Progress(**saved["progress"])
        print(f"resumed at step {progress.step}, stage {progress.stage}", flush=True)
    model.set_attn_implementation("float_attention")
    model.train()
    _loop(rank, args, tokenizer, weights, progress)


def _share(weights: MasterWeights, loss: torch.Tensor, workers: int) -> float:
    """Averages the gradients and the loss over the workers; returns the loss."""
    if workers == 1:
        return loss.item()
    flat = torch.cat([loss.detach().view(1), *(p.grad.float().view(-1) for p in weights.model.parameters())])
    dist.all_reduce(flat)
    flat /= workers
    offset = 1
    for parameter in weights.model.parameters():
        parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()
    return flat[0].item()


def _source(
    rank: int, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, progress: Progress
) -> Iterator[Batch]:
    # A resumed run draws fresh data: its seed depends on the step it resumes from.
    seed = args.seed * 1_000_003 + progress.step * 64 + progress.stage * 16 + rank
    return batches(tokenizer, progress.stage, seed, args.tokens)


def _log(path: Path, progress: Progress, rate: float) -> None:
    """Adds the run's figures to its curve and prints them; the loss is a running mean over about 30 steps."""
    line = json.dumps({**asdict(progress), "loss": round(progress.loss, 4), "rate": round(rate, 4)})
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def _loop(
    rank: int, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, weights: MasterWeights, progress: Progress
) -> None:
    source, mark = _source(rank, args, tokenizer, progress), time.monotonic()
    parent = os.getppid()
    while progress.step < args.steps and (args.workers == 1 or os.getppid() == parent):
        batch = next(source)
        rate = args.peak * scale(progress.step, args.steps, args.decay)
        loss = answer_loss(weights.model, batch)
        loss.backward()
        value = _share(weights, loss, args.workers)
        weights.step(rate)
        progress.loss += 0.03 * (value - progress.loss) if progress.stage_step else value - progress.loss
        progress.step, progress.stage_step = progress.step + 1, progress.stage_step + 1
        progress.tokens += args.workers * batch.ids.numel()
        now = time.monotonic()
        progress.seconds, mark = progress.seconds + now - mark, now
        if rank == 0 and progress.step % 20 == 0:
            _log(args.run / "curve.jsonl", progress, rate)
        if progress.stage < len(STAGES) - 1 and progress.stage_step >= 50 and progress.loss < ADVANCE[progress.stage]:
            progress.stage, progress.stage_step = progress.stage + 1, 0
            source = _source(rank, args, tokenizer, progress)
        if rank == 0 and (progress.step % args.save_every == 0 or progress.step == args.steps):
            save(args.run / "checkpoint.pt", weights, progress)


if __name__ == "__main__":
    main()
