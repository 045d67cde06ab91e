"""Which of the modules outside the layers is the embedding, the final norm or the head.

Shapes decide first: an embedding and a head have a row for each token of the vocabulary, a norm has one dimension as
long as the hidden size. Names decide between roles that fit equally well, and place decides where names are unfamiliar:
the head hangs furthest out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.checkpoint.architecture import language_config, whole_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lyra_emergence.checkpoint.safetensors_header import TensorInfo

__all__ = ["Roles", "Surroundings", "find_roles"]

_HEAD_NAME = re.compile(r"(^|_)head$|^embed_out$|(^|_)out(put)?(_|$)|unembed|logits|pred_layer")
_CERTAIN_HEADS = frozenset({"lm_head", "embed_out"})
_EMBEDDING_NAME = re.compile(r"embed|^w[tp]e$|emb$|^tok")
_NORM_TENSORS = frozenset({"weight", "bias", "scale", "gamma", "beta"})
_HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model")
_MATRIX = 2


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known of a model before its loose modules are judged.

    Attributes:
        around: The module that holds the layers, and all that it lies in, outermost "".
        towers: Modules that hold other numbered stacks and not the layers, such as a vision tower.
        vocabulary: Tokens of the vocabulary, None where config.json does not say.
        hidden: Length of a hidden state, None where config.json does not say.
    """

    around: frozenset[str]
    towers: frozenset[str]
    vocabulary: int | None
    hidden: int | None

    @classmethod
    def of(cls, stack: str, other_stacks: Sequence[str], config: Mapping[str, Any]) -> Surroundings:
        """Return the surroundings of the layers under `stack`, such as "model.layers"."""
        text = language_config(config)
        path = _path(stack)
        return cls(
            around=frozenset({"", *path[:-1]}),
            towers=frozenset(_tower(other, path) for other in other_stacks),
            vocabulary=whole_number(text, "vocab_size"),
            hidden=next((size for key in _HIDDEN_SIZES if (size := whole_number(text, key))), None),
        )

    def is_beside_layers(self, module: str) -> bool:
        """Return whether `module` hangs where the layers do, or further out."""
        return module.rpartition(".")[0] in self.around

    def is_foreign(self, module: str) -> bool:
        """Return whether `module` belongs to another numbered stack."""
        return any(path in self.towers for path in _path(module))


@dataclass(frozen=True, slots=True)
class Roles:
    """Module names by role.

    Attributes:
        embeddings: The tokens' table first, then tables of positions or token types.
        norms: The norm behind the last layer; none where it has no weight.
        head: The module that turns hidden states into logits; None where nothing of it is stored.
        others: All the rest, in file order.
    """

    embeddings: tuple[str, ...]
    norms: tuple[str, ...]
    head: str | None
    others: tuple[str, ...]


def find_roles(modules: Mapping[str, Sequence[TensorInfo]], known: Surroundings) -> Roles:
    """Return the role of each module, given the tensors of each."""
    own = {name: tensors for name, tensors in modules.items() if not known.is_foreign(name)}
    tables = [name for name, tensors in own.items() if _is_table(name, tensors, known)]
    # A table of as many positions as there are tokens must not pass for the tokens' own.
    tables.sort(key=lambda name: not _is_word_table(name))
    head = _head(own, tables, known)
    lookups = [name for name, tensors in own.items() if _named(_EMBEDDING_NAME, name) and _has_matrix(tensors)]
    embeddings = tuple(name for name in dict.fromkeys((*tables, *lookups)) if name != head)
    spare = [name for name in own if name not in embeddings and name != head]
    norms = _final_norms([name for name in spare if _is_norm(name, own[name], known)])
    taken = {*embeddings, *norms, head}
    return Roles(embeddings, norms, head, tuple(name for name in modules if name not in taken))


def _head(own: Mapping[str, Sequence[TensorInfo]], tables: Sequence[str], known: Surroundings) -> str | None:
    outside = [name for name in tables if known.is_beside_layers(name)]
    named = [name for name in outside if _named(_HEAD_NAME, name)]
    # A quantization packs the head's rows, and a tied head may store its bias alone.
    beside = [name for name in own if known.is_beside_layers(name)]
    certain = [name for name in beside if _last(name) in _CERTAIN_HEADS or _is_head_bias(own[name], known)]
    if named or certain:
        return (named or certain)[0]
    unfamiliar = [name for name in reversed(outside) if not _named(_EMBEDDING_NAME, name)]
    # One table alone is the embedding, whatever it is called.
    return min(unfamiliar, key=lambda name: name.count(".")) if unfamiliar and len(tables) > 1 else None


def _is_table(name: str, tensors: Sequence[TensorInfo], known: Surroundings) -> bool:
    if known.vocabulary is None:
        return _has_matrix(tensors) and (_last(name) in _CERTAIN_HEADS or _is_word_table(name))
    return any(len(tensor.shape) == _MATRIX and tensor.shape[0] == known.vocabulary for tensor in tensors)


def _is_head_bias(tensors: Sequence[TensorInfo], known: Surroundings) -> bool:
    return known.vocabulary != known.hidden and [
        (tensor.name.rpartition(".")[2], tensor.shape) for tensor in tensors
    ] == [("bias", (known.vocabulary,))]


def _is_word_table(name: str) -> bool:
    return _named(_EMBEDDING_NAME, name) and "pos" not in _last(name) and _last(name) != "wpe"


def _is_norm(name: str, tensors: Sequence[TensorInfo], known: Surroundings) -> bool:
    return known.is_beside_layers(name) and all(
        len(tensor.shape) == 1
        and known.hidden in (None, tensor.shape[0])
        and tensor.name.rpartition(".")[2] in _NORM_TENSORS
        for tensor in tensors
    )


def _final_norms(candidates: Sequence[str]) -> tuple[str, ...]:
    """Leave out norms of the embeddings (Bloom), unless there is no other (LFM2 calls its final norm so)."""
    final = tuple(name for name in candidates if not _named(_EMBEDDING_NAME, name))
    return final or tuple(candidates)


def _has_matrix(tensors: Sequence[TensorInfo]) -> bool:
    return any(len(tensor.shape) == _MATRIX for tensor in tensors)


def _named(pattern: re.Pattern[str], module: str) -> bool:
    return pattern.search(_last(module)) is not None


def _last(module: str) -> str:
    return module.rpartition(".")[2].lower()


def _path(module: str) -> list[str]:
    """Return the modules that `module` lies in, the outermost first, and itself."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _tower(other: str, path: Sequence[str]) -> str:
    """Return the outermost module on the way to the stack `other` that is not on the `path` to the layers."""
    return next((module for module in _path(other) if module not in path), other)
