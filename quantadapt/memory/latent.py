"""The sizes of latent attention, as a config.json tells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Latent:
    """Attention whose keys and values come from a latent state, as DeepSeek's.

    Attributes:
        query_rank, key_rank: sizes of the latent states; the first is 0 where queries have none.
        rope: size of the part of keys that knows positions, which all heads share.
        queries, values: size of all heads' queries, as of their keys, and of all heads' values.
        heads: how many.
    """

    query_rank: int
    key_rank: int
    rope: int
    queries: int
    values: int
    heads: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Latent | None:
        """Read the contents of a config.json; None for any other attention. Raises KeyError where
        it is latent, and not as DeepSeek's."""
        if not config.get("kv_lora_rank"):
            return None
        if not str(config["model_type"]).startswith("deepseek_v"):
            raise KeyError("kv_lora_rank")
        heads, rope = int(config["num_attention_heads"]), int(config["qk_rope_head_dim"])
        return cls(
            query_rank=int(config.get("q_lora_rank") or 0),
            key_rank=int(config["kv_lora_rank"]),
            rope=rope,
            queries=heads * (int(config["qk_nope_head_dim"]) + rope),
            values=heads * int(config["v_head_dim"]),
            heads=heads,
        )

    def linears(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Return the linear layers, (in_features, out_features)."""
        made = self.queries - self.heads * self.rope + self.values
        queries = {"q_proj": (hidden, self.queries)}
        if self.query_rank:
            first, second = (hidden, self.query_rank), (self.query_rank, self.queries)
            queries = {"q_a_proj": first, "q_b_proj": second}
        return queries | {
            "kv_a_proj_with_mqa": (hidden, self.key_rank + self.rope),
            "kv_b_proj": (self.key_rank, made),
            "o_proj": (self.values, hidden),
        }

    @property
    def kept(self) -> int:
        """How many numbers per token attention keeps: both latent states before and after their
        norms, queries and keys with their positions, values (which are a part of what is made of
        the latent state), and what attention returns."""
        states = 2 * (self.query_rank + self.key_rank)
        made = self.queries - self.heads * self.rope + self.values
        return states + 2 * self.queries + made + self.values
