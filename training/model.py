"""The model's shape, and the optimizers that train it in bfloat16 over float32 master weights."""

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from training.tokenizer import CONTEXT


def _float_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: object,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention in float32, whose backward pass takes a fifth of bfloat16's time on a CPU; no left padding."""
    del module, mask
    wide = scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True)
    return wide.to(query.dtype).transpose(1, 2), None  # (rows, tokens, heads, width)


AttentionInterface.register("float_attention", _float_attention)


def build(vocabulary: int, pad: int, bos: int, end: int) -> LlamaForCausalLM:
    """Builds the model: narrow feed-forward, tied embeddings, heads wide enough to compare tokens."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
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

    def __init__(self, model: LlamaForCausalLM, matrix_lr: float = 0.01, other_lr: float = 1.5e-3) -> None:
        self.model = model
        self.masters = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        model.to(torch.bfloat16)
        for master in self.masters.values():
            master.requires_grad_(requires_grad=True)
        hidden = [m for name, m in self.masters.items() if m.ndim == 2 and "embed" not in name]
        rest = [m for name, m in self.masters.items() if m.ndim != 2 or "embed" in name]
        self.optimizers = (
            torch.optim.Muon(hidden, lr=matrix_lr, momentum=0.95, weight_decay=0.01),
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
        for weight, master in self._pairs():
            weight.copy_(master)
        self._probe_optimizer.step()
        self._probe_optimizer.zero_grad()

    def parameters(self) -> list[torch.nn.Parameter]:
        """Returns everything that takes gradients: the model's weights and the probe's."""
        return [*self.model.parameters(), *self.probe.parameters()]

    def state(self) -> dict[str, object]:
        """Returns what a resumed run needs."""
        return {
            "masters": self.masters,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "probe": self.probe.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, object]) -> None:
        """Takes back what `state` returned."""
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])  # type: ignore[index]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):  # type: ignore[call-overload]
            optimizer.load_state_dict(saved)
        if "probe" in state and state["probe"]["weight"].shape == self.probe.weight.shape:  # type: ignore[index]
            self.probe.load_state_dict(state["probe"])  # type: ignore[arg-type]
        for weight, master in self._pairs():
            weight.copy_(master)
