"""The model's shape, and the optimizers that train it in bfloat16 over float32 master weights."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from training.tokenizer import CONTEXT


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: object,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention for right-padded rows, written out: on a CPU it is a third faster than the fused operator.

    Products run in the weights' dtype, the softmax in float32.
    """
    del module, mask
    groups = query.shape[1] // key.shape[1]
    rows, heads, tokens, width = query.shape
    keys = key.repeat_interleave(groups, 1).reshape(rows * heads, tokens, width)
    values = value.repeat_interleave(groups, 1).reshape(rows * heads, tokens, width)
    scores = torch.bmm(query.reshape(rows * heads, tokens, width), keys.transpose(1, 2)).float()
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = (scores * width**-0.5).masked_fill(hidden, float("-inf")).softmax(-1).to(query.dtype)
    out = torch.bmm(weights, values).view(rows, heads, tokens, width)
    return out.transpose(1, 2), None  # (rows, tokens, heads, width)


AttentionInterface.register("packed_attention", _packed_attention)


LAYERS = 10


def build(vocabulary: int, pad: int, bos: int, end: int, layers: int = LAYERS) -> LlamaForCausalLM:
    """Builds the model: narrow feed-forward, tied embeddings, heads wide enough to compare tokens."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=end,
        initializer_range=0.02,
        use_cache=True,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


class MasterWeights:
    """A bfloat16 model with float32 masters: Muon steps the matrices, AdamW embeddings and norms.

    The forward pass runs on the very rounding that ships, so bfloat16 and float32 answers agree after export.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        rank: int = 0,
        workers: int = 1,
        matrix_lr: float = 0.01,
        other_lr: float = 1.5e-3,
    ) -> None:
        self.model = model
        self._workers = workers
        self.masters = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        model.to(torch.bfloat16)
        for master in self.masters.values():
            master.requires_grad_(requires_grad=True)
        hidden = [m for name, m in self.masters.items() if m.ndim == 2 and "embed" not in name]
        rest = [m for name, m in self.masters.items() if m.ndim != 2 or "embed" in name]
        # Muon's orthogonalization is a quarter of a step on one thread, so each worker does a share of the matrices.
        self._shares = [hidden[start::workers] for start in range(workers)]
        self.optimizers = (
            torch.optim.Muon(self._shares[rank], lr=matrix_lr, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self._peaks = (matrix_lr, other_lr)
        self.probe = torch.nn.Linear(model.config.hidden_size, 2)
        torch.nn.init.zeros_(self.probe.weight)
        self._probe_optimizer = torch.optim.AdamW(self.probe.parameters(), lr=1e-2, weight_decay=0.0)

    def _pairs(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        return ((p, self.masters[name]) for name, p in self.model.named_parameters())

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Takes one step with both learning rates at `scale` of their peak, and clears the gradients."""
        for weight, master in self._pairs():
            master.grad = weight.grad.float() if weight.grad is not None else None
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(list(self.masters.values()), 1.0)
        for optimizer, peak in zip(self.optimizers, self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
        self._exchange()
        for weight, master in self._pairs():
            weight.copy_(master)
        self._probe_optimizer.step()
        self._probe_optimizer.zero_grad()

    def _exchange(self) -> None:
        """Gives every worker the matrices that another one has stepped."""
        if self._workers == 1:
            return
        for owner, share in enumerate(self._shares):
            flat = torch.cat([master.view(-1) for master in share])
            dist.broadcast(flat, owner)
            for master, part in zip(share, flat.split([master.numel() for master in share]), strict=True):
                master.copy_(part.view_as(master))

    def parameters(self) -> list[torch.nn.Parameter]:
        """Returns everything that takes gradients: the model's weights and the probe's."""
        return [*self.model.parameters(), *self.probe.parameters()]

    def state(self) -> dict[str, object]:
        """Returns what a resumed run needs; every worker must call it."""
        muon = [self.optimizers[0].state_dict()]
        if self._workers > 1:
            muon = [{} for _ in range(self._workers)]
            dist.all_gather_object(muon, self.optimizers[0].state_dict())
        return {
            "masters": self.masters,
            "muon": muon,
            "adam": self.optimizers[1].state_dict(),
            "probe": self.probe.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any], rank: int = 0) -> None:
        """Takes back what `state` returned; Muon's momentum is dropped if the number of workers has changed."""
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        if len(state["muon"]) == self._workers:
            self.optimizers[0].load_state_dict(state["muon"][rank])
        self.optimizers[1].load_state_dict(state["adam"])
        self.probe.load_state_dict(state["probe"])
        for weight, master in self._pairs():
            weight.copy_(master)
