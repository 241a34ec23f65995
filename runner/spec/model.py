"""`model=`: which model, pretrained or from random weights."""

from __future__ import annotations

import os

from pydantic import Field, field_validator, model_validator

from runner.spec.part import Named

MOST_LAYERS = 10_000
"""The plan lists each layer; Llama 405B has 126, the deepest decoder published (DeepNet, arXiv 2203.00555) 1,000."""


class ModelSpec(Named):
    """The model, and the facts about its architecture that are known without loading it."""

    name: str = "hub"
    """Name of the choice, as in `model=mistral7b`."""
    id: str = Field(min_length=1)
    """Hugging Face Hub id (`org/name`) or a local folder that `from_pretrained` can read; `~` is the home folder."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null means the default branch. The commit that was loaded is recorded with the run."""
    package: str | None = None
    """Python package that carries the weights, instead of the Hub (the offline demo model)."""
    gguf_file: str | None = None
    """GGUF file inside `package` or the model folder; it is dequantised once and cached."""
    from_scratch: bool = False
    """Start from random weights of the sizes below instead of loading `id`; the tokenizer is `objective.tokenizer`, or is trained."""
    gated: bool = False
    """The Hub requires an accepted licence: set `HF_TOKEN`."""
    architecture: str | None = None
    """`model_type` in transformers, such as `llama` or `mixtral`; null for a model that is not in the catalogue."""
    num_parameters: int | None = Field(default=None, ge=1)
    """Exact number of parameters, tied weights counted once; a test checks it against transformers."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Width of the residual stream."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the MLP (of one expert, in a mixture)."""
    num_layers: int | None = Field(default=None, ge=1, le=MOST_LAYERS)
    """Number of decoder layers."""
    num_heads: int | None = Field(default=None, ge=1)
    """Number of attention heads."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Number of key/value heads; fewer than `num_heads` means grouped-query attention."""
    head_dim: int | None = Field(default=None, ge=1)
    """Width of one head; null means `hidden_size / num_heads`."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Rows of the embedding matrix."""
    context_length: int | None = Field(default=None, ge=1)
    """Longest supported sequence, in tokens."""
    tie_embeddings: bool | None = None
    """Input and output embeddings are one matrix."""
    attention_bias: bool | None = None
    """Queries, keys and values have a bias; null means as usual in the architecture."""
    num_experts: int | None = Field(default=None, ge=1)
    """Experts per layer; null for a dense model."""
    experts_per_token: int | None = Field(default=None, ge=1)
    """Experts each token is routed to; null for a dense model."""
    dense_layers: int | None = Field(default=None, ge=0)
    """First layers of a mixture that have an MLP and no experts (GLM-4 MoE)."""
    dense_intermediate_size: int | None = Field(default=None, ge=1)
    """Width of that MLP."""
    shared_intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the expert that every token goes through."""
    qk_norm: bool | None = None
    """Queries and keys are normalised, in an architecture that leaves a choice of it (GLM-4 MoE)."""
    q_lora_rank: int | None = Field(default=None, ge=1)
    """Width of the vector that queries are made of in latent attention (DeepSeek); null where they have one matrix."""
    kv_lora_rank: int | None = Field(default=None, ge=1)
    """Width of the vector that keys and values are made of there."""
    qk_nope_head_dim: int | None = Field(default=None, ge=1)
    """Features of a head of queries and keys there that are not rotated."""
    qk_rope_head_dim: int | None = Field(default=None, ge=1)
    """Features that are."""
    v_head_dim: int | None = Field(default=None, ge=1)
    """Width of a head of values there."""
    linear_num_key_heads: int | None = Field(default=None, ge=1)
    """Heads of queries and keys in layers with linear attention (Qwen3.5)."""
    linear_num_value_heads: int | None = Field(default=None, ge=1)
    """Heads of values there."""
    linear_key_head_dim: int | None = Field(default=None, ge=1)
    """Width of one of those heads of queries and keys."""
    linear_value_head_dim: int | None = Field(default=None, ge=1)
    """Width of one of those heads of values."""
    learning_rate_full: float = Field(default=1e-5, gt=0)
    """Learning rate that methods training the model's own weights start from."""
    learning_rate_adapter: float = Field(default=2e-4, gt=0)
    """Learning rate that LoRA-like methods start from."""

    @field_validator("id")
    @classmethod
    def _at_home(cls, value: str) -> str:
        """With the home folder in place of `~`, which no id of the Hub begins with and which `from_pretrained` does not know."""
        return os.path.expanduser(value)

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelSpec:
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        return self
