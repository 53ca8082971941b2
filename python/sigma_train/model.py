"""The language model: the Qwen3-MoE architecture of Hugging Face, on `sigma_kernels.nn`.

Pre-norm blocks of grouped-query attention with normalised queries and keys, and a mixture of SwiGLU experts, or one
dense SwiGLU MLP where num_experts is 1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_kernels.nn import MoE
from sigma_train.config import Config, ModelConfig
from sigma_train.products import Linear, causal_attention


def runs_at_one(config: Config) -> bool:
    """Whether a layer of the run has one expert a token in any of its steps."""
    s = config.sparsity
    return 1 in (s.sample or {*config.model.layer_top_k, *(k for phase in s.phases for k in phase[1])})


def precision(config: Config) -> torch.autocast:
    """Wrap calls of the model: where train.dtype is bf16 the operands of its matrix products are rounded to bf16.

    Weights, their gradients, norms, the residual stream and the router stay f32.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=config.train.dtype == "bf16")


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (Su et al. 2021) and RMS-normalised queries and keys."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, S, _ = x.shape
        q = self.q_norm(self.q_proj(x).float().view(B, S, self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).float().view(B, S, self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, S, self.num_kv_heads, self.head_dim).transpose(1, 2)
        out = causal_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.transpose(1, 2).reshape(B, S, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (x_i, x_{i+d/2}) by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class MLP(nn.Module):
    """The dense twin of an expert: down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config, top_k: int) -> None:
        super().__init__()
        c, r = config.model, config.router
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.mlp: nn.Module
        if c.num_experts == 1:
            self.mlp = MLP(c.hidden_size, c.intermediate_size * top_k)
        else:
            self.mlp = MoE(
                c.hidden_size,
                c.intermediate_size,
                c.num_experts,
                top_k,
                score=r.score,
                normalize=r.normalize and top_k > 1,  # over one expert it would cut the router's gradient
                use_bias=r.balance == "bias",
                output_scale=r.output_scale,
                balance_score=r.aux_score,
            )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE) and torch.is_autocast_enabled("cpu"):
            return x + self.mlp(normed, compute_dtype=torch.bfloat16)
        return x + self.mlp(normed)


class LanguageModel(nn.Module):
    """Tokens [B, S] int64 to logits [B, S, vocabulary] f32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config.model
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(config, k) for k in c.layer_top_k)
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.lm_head = Linear(c.hidden_size, c.vocab_size)
        if c.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.outer(torch.arange(c.max_seq_len), frequency).repeat(1, 2)  # [S, head_dim]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self._initialize(c)
        r = config.router
        self._normalizes, self._normalizes_one = r.normalize, r.normalize_one or not runs_at_one(config)
        if c.num_experts > 1:
            self.set_top_k(c.layer_top_k)

    def _initialize(self, c: ModelConfig) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = c.expert_init_std if ".experts." in name and c.expert_init_std else c.init_std
                nn.init.normal_(parameter, std=std)

    def set_top_k(self, top_k: int | Sequence[int]) -> None:
        """Experts a token from now on: of all layers, or of each.

        Where router.normalize is set, the weights of the chosen add up to 1 at every k, so that the experts' share of
        the residual stream does not depend on it.  A k of 1 is left out where the run itself computes at it, unless
        router.normalize_one is set: a weight of 1 passes no gradient to the router.
        Raises: ValueError if the model is dense, there is not one k for each layer, or one is not in 1..E.
        """
        layers = self.moe_layers()
        ks = [top_k] * len(layers) if isinstance(top_k, int) else list(top_k)
        if not layers:
            raise ValueError("set_top_k: the model is dense, it chooses no experts")
        if len(ks) != len(layers):
            raise ValueError(
                f"set_top_k: top_k must have one entry for each of {len(layers)} layers, found {ks}"
            )
        E = layers[0].router.weight.shape[0]
        if not all(1 <= k <= E for k in ks):
            raise ValueError(f"set_top_k: top_k must lie in 1..{E}, found {top_k}")
        for moe, k in zip(layers, ks, strict=True):
            moe.router.top_k = k
            moe.router.normalize = self._normalizes and (k > 1 or self._normalizes_one)

    def moe_layers(self) -> list[MoE]:
        return [block.mlp for block in self.layers if isinstance(block.mlp, MoE)]

    def forward(self, tokens: Tensor) -> Tensor:
        S = tokens.shape[1]
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x, self.cos[:S], self.sin[:S])
        return self.lm_head(self.norm(x)).float()

    def active_parameters(self, top_k: Sequence[float] | None = None) -> int:
        """Parameters that one token meets, embeddings counted once; with so many experts in each layer, or as now."""
        total = sum(p.numel() for p in self.parameters())
        now = [moe.router.top_k for moe in self.moe_layers()]
        for moe, k in zip(self.moe_layers(), now if top_k is None else top_k, strict=True):
            E = moe.router.weight.shape[0]
            experts = sum(p.numel() for p in moe.experts.parameters())
            total -= experts - round(experts // E * k)
        return total


def flops_per_token(model: LanguageModel, config: Config, top_k: Sequence[float] | None = None) -> int:
    """Of a training step, which computes forward once and backward twice: what its matrix products cannot do without.

    6 * active parameters + 12 * layers * heads * head_dim * positions (Chowdhery et al. 2022, appendix B): attention is
    counted over all positions of the sequence, as if it were not causal.  `model` is whole, not spread over ranks.
    """
    c = config.model
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * config.train.seq_len
    return 6 * model.active_parameters(top_k) + attention
