"""The one schema: what a run is, after composition and before anything happens.

`RunSpec` is frozen, knows no Hydra and no torch, and refuses unknown keys. Units stand in the
names (`memory_gib`, `usd_per_hour`). The sentence under a field is its documentation:
`docs/reference.md` is generated from it. A default stands here and nowhere else; files in
`conf/` hold only what a choice changes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from runner.layers import parse_layers

Auto = Literal["auto"]
Layers = str | list[int | str]


class Part(BaseModel):
    """Base of every part of a run: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Named(Part):
    """A part chosen by name from a `conf/` group, with what people call it."""

    title: str | None = None
    """Name as a person would write it, such as `Mistral 7B`."""
    aliases: list[str] = []
    """What else people call it, cased as they write it: used for "did you mean" and for the `commands` data set."""


class ModelSpec(Named):
    """Which pretrained model, and the facts about its architecture that can be known without loading it."""

    name: str = "hub"
    """Name of the choice, as in `model=mistral7b`."""
    id: str = Field(min_length=1)
    """Hugging Face Hub id (`org/name`) or a local folder that `from_pretrained` can read."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null means the default branch. The commit that was loaded is recorded with the run."""
    package: str | None = None
    """Python package that carries the weights, instead of the Hub (the offline demo model)."""
    gguf_file: str | None = None
    """GGUF file inside `package` or the model folder; it is dequantised once and cached."""
    gated: bool = False
    """The Hub asks for an accepted licence: set `HF_TOKEN`."""
    architecture: str | None = None
    """`model_type` in transformers, such as `llama` or `mixtral`; null for a model that is not in the catalogue."""
    num_parameters: int | None = Field(default=None, ge=1)
    """Exact number of parameters, tied weights counted once; a test checks it against transformers."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Width of the residual stream."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the MLP (of one expert, in a mixture)."""
    num_layers: int | None = Field(default=None, ge=1)
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
    """Longest sequence the model was made for, in tokens."""
    tie_embeddings: bool | None = None
    """Input and output embeddings are one matrix."""
    num_experts: int | None = Field(default=None, ge=1)
    """Experts per layer; null for a dense model."""
    experts_per_token: int | None = Field(default=None, ge=1)
    """Experts each token is routed to; null for a dense model."""
    learning_rate_full: float = Field(default=1e-5, gt=0)
    """Learning rate that methods training the model's own weights start from."""
    learning_rate_adapter: float = Field(default=2e-4, gt=0)
    """Learning rate that LoRA-like methods start from."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelSpec:
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        return self


class Full(Part):
    """Train every weight."""

    name: Literal["full"] = "full"
    """Name of the choice."""
    master_weights: bool = True
    """Keep the weights in fp32 and compute in 16 bits; false keeps them in 16 bits: half the memory, small updates are lost."""


class Freeze(Part):
    """Train some whole layers and leave the others as they are."""

    name: Literal["freeze"] = "freeze"
    """Name of the choice."""
    layers: Layers = "last:2"
    """Layers to train: `last:2`, `first:4`, a range `0-3`, or a list such as `[0,2,5-7]`; indices match exactly."""
    extra_modules: list[str] = []
    """Modules outside the layers to train as well, by exact name: `embed_tokens`, `norm`, `lm_head`, …"""
    master_weights: bool = True
    """Keep the trained weights in fp32 and compute in 16 bits; false keeps them in 16 bits."""

    @field_validator("layers")
    @classmethod
    def _layers_parse(cls, value: Layers) -> Layers:
        parse_layers(value)
        return value


class _Adapter(Part):
    """What LoRA and both QLoRA share."""

    rank: int = Field(default=16, ge=1)
    """Rank r of the update B·A."""
    alpha: int = Field(default=32, ge=1)
    """Scale: the update is multiplied by alpha / rank (alpha / √rank with rsLoRA)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers that get an adapter: all but the output head, or a list of names such as `[q_proj,v_proj]`."""
    layers: Layers | None = None
    """Only these layers, written as for `freeze`; null means all."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732): better at high ranks."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353): a little better at low ranks, slower."""
    modules_to_save: list[str] = []
    """Modules trained whole beside the adapter, such as `[embed_tokens,lm_head]` after adding tokens."""

    @field_validator("layers")
    @classmethod
    def _layers_parse(cls, value: Layers | None) -> Layers | None:
        if value is not None:
            parse_layers(value)
        return value


class Lora(_Adapter):
    """Train a low-rank update of the frozen model (arXiv 2106.09685)."""

    name: Literal["lora"] = "lora"
    """Name of the choice."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """How A and B start: PEFT's default, gaussian, or from the weight's own decomposition (PiSSA, OLoRA)."""

    @model_validator(mode="after")
    def _init_fits(self) -> Lora:
        if self.init in ("pissa", "olora") and self.use_rslora:
            raise ValueError(
                f"method.init={self.init} cannot be combined with method.use_rslora=true: PEFT cannot write "
                "the result as a plain adapter; set one of the two back to its default"
            )
        if self.init in ("pissa", "olora") and self.use_dora:
            raise ValueError(
                f"method.init={self.init} cannot be combined with method.use_dora=true; "
                "set one of the two back to its default"
            )
        return self


class QLora4(_Adapter):
    """LoRA over a base quantised to 4 bits (arXiv 2305.14314)."""

    name: Literal["qlora4"] = "qlora4"
    """Name of the choice."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book: nf4 fits normally distributed weights."""
    double_quant: bool = True
    """Quantise the quantisation constants too: 0.37 bit per parameter less."""


class QLora8(_Adapter):
    """LoRA over a base quantised to int8 (LLM.int8(), arXiv 2208.07339)."""

    name: Literal["qlora8"] = "qlora8"
    """Name of the choice."""
    outlier_threshold: float = Field(default=6.0, ge=0)
    """Activations above this magnitude are multiplied in 16 bits."""


Method = Annotated[Full | Freeze | Lora | QLora4 | QLora8, Field(discriminator="name")]


class HardwareSpec(Named):
    """One machine, or several alike."""

    name: str = Field(min_length=1)
    """Name of the choice, as in `hw=h100x3`."""
    accelerator: Literal["detect", "cuda", "cpu"]
    """`cuda`, `cpu`, or `detect`: look at this machine when the run is composed."""
    gpu: str | None = None
    """The GPU's name as the driver reports it, without the vendor, such as `H100 80GB HBM3`."""
    runpod_gpu_id: str | None = None
    """RunPod's exact id of this GPU."""
    num_gpus: int = Field(default=0, ge=0)
    """GPUs per node."""
    num_nodes: int = Field(default=1, ge=1)
    """Machines."""
    num_processes: int | None = Field(default=None, ge=1)
    """Processes per node; null means one per GPU, or one on a CPU."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU (of the machine, on a CPU)."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPU cores of one node; on a CPU run, the threads torch uses."""
    host_memory_gib: float | None = Field(default=None, gt=0)
    """Main memory of one node."""
    bf16: bool | None = None
    """The hardware multiplies in bfloat16 natively."""
    flash_attention: bool = False
    """FlashAttention 2 runs on it (Ampere and later)."""
    compute_capability: float | None = Field(default=None, gt=0)
    """CUDA compute capability."""
    tflops_bf16: float | None = Field(default=None, gt=0)
    """Dense 16-bit peak of one GPU in TFLOP/s, without sparsity, from the vendor's datasheet."""
    bandwidth_gb_s: float | None = Field(default=None, gt=0)
    """Memory bandwidth of one GPU in GB/s, from the vendor's datasheet."""
    interconnect: Literal["nvlink", "pcie", "none"] | None = None
    """What joins the GPUs of one node."""
    usd_per_hour: float | None = Field(default=None, ge=0)
    """Price of one GPU for one hour, in US$, as seen on `price_date`: a fallback for a live catalogue."""
    price_date: str | None = None
    """Day on which `usd_per_hour` was seen, and by whom."""
    env: dict[str, str] = {}
    """Environment variables every process gets, such as `NCCL_P2P_DISABLE`."""

    @field_validator("env", mode="before")
    @classmethod
    def _strings(cls, value: Any) -> Any:
        """Numbers as text; null takes a variable of the profile away."""
        return {k: str(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _gpus_match(self) -> HardwareSpec:
        if self.accelerator == "cuda" and self.num_gpus < 1:
            raise ValueError("hw.num_gpus must be at least 1 where hw.accelerator is cuda; choose hw=cpu for none")
        if self.accelerator == "cpu" and self.num_gpus:
            raise ValueError(
                "hw.num_gpus must be 0 where hw.accelerator is cpu; choose hw=local for this machine's GPUs"
            )
        return self

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.num_nodes * (self.num_processes or max(1, self.num_gpus))


class DeepSpeedSpec(Part):
    """Which DeepSpeed ZeRO stage shards the training state."""

    name: Literal["auto", "none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"] = "auto"
    """The stage; auto takes none for one process."""
    config: str | None = None
    """DeepSpeed JSON: a file name in `deepspeed_configs/`, or a path."""
    nvme_path: str | None = None
    """Folder on an NVMe disk for what `zero3_offload` moves out of the GPU, instead of main memory."""


class Sft(Part):
    """Supervised fine-tuning: next-token loss."""

    name: Literal["sft"] = "sft"
    """Name of the choice."""
    loss_on: Literal["auto", "completion", "all"] = "auto"
    """Tokens the loss is taken on: auto means the completion where there is a prompt, else all."""


class LaterObjective(Part):
    """An objective that is named already and cannot run yet."""

    name: Literal["pretrain", "dpo", "kto", "orpo", "reward", "grpo"]
    """Name of the choice."""


Objective = Annotated[Sft | LaterObjective, Field(discriminator="name")]


class DataSpec(Part):
    """Where the examples come from and what their fields are called."""

    name: str = "file"
    """Name of the choice, as in `data=commands`."""
    source: Literal["commands", "file", "hub"] = "file"
    """The bundled generator, local files, or a data set on the Hugging Face Hub."""
    path: str | None = None
    """JSON, JSONL, CSV or Parquet file for `source=file`; relative to where the command is typed."""
    eval_path: str | None = None
    """File with held-out rows; null means `eval_fraction` of the rows is held out."""
    id: str | None = None
    """Hub id of the data set for `source=hub`."""
    revision: str | None = None
    """Branch, tag or commit of the data set on the Hub."""
    subset: str | None = None
    """Configuration of the data set on the Hub."""
    split: str = "train"
    """Split of the data set on the Hub."""
    eval_split: str | None = None
    """Split with held-out rows; null means `eval_fraction` of the rows is held out."""
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the rows held out where no separate file or split is named."""
    max_examples: int | None = Field(default=None, ge=1)
    """Take only the first n training rows."""
    max_eval_examples: int | None = Field(default=None, ge=1)
    """Take only the first n held-out rows: a large set makes every evaluation slow."""
    format: Literal["auto", "chat", "prompt_completion", "text"] = "auto"
    """Shape of a row; auto looks at the fields of the first."""
    messages_field: str = "messages"
    """Field with the list of `{role, content}` turns."""
    prompt_field: str = "prompt"
    """Field with the prompt."""
    completion_field: str = "completion"
    """Field with the answer."""
    text_field: str = "text"
    """Field with plain text."""
    system_prompt: str | None = None
    """System turn put before every conversation that has none."""
    chat_template: str | None = None
    """Jinja file with a chat template; null means the tokenizer's own, or ChatML if it has none."""

    @model_validator(mode="after")
    def _source_has_its_key(self) -> DataSpec:
        if self.source == "file" and not self.path:
            raise ValueError("data.path is missing; name a file, such as data.path=my.jsonl")
        if self.source == "hub" and not self.id:
            raise ValueError("data.id is missing; name a data set, such as data.id=org/name")
        return self


class _Place(Part):
    """What every place shares."""

    max_usd: float | None = Field(default=None, gt=0)
    """Refuse a run whose plan costs more than this, in US$."""
    max_hours: float | None = Field(default=None, gt=0)
    """Refuse a run whose plan takes longer than this."""


class LocalPlace(_Place):
    """Run on this machine."""

    name: Literal["local"] = "local"
    """Name of the choice."""


class AutoPlace(_Place):
    """Run here if it fits here, else on the cheapest rented hardware that it fits."""

    name: Literal["auto"]
    """Name of the choice."""


class LaterPlace(_Place):
    """A place that is named already and cannot run yet."""

    name: Literal["runpod"]
    """Name of the choice."""


Where = Annotated[LocalPlace | AutoPlace | LaterPlace, Field(discriminator="name")]


class TrackSpec(Part):
    """Where metrics go besides the run directory."""

    name: Literal["none", "tensorboard", "wandb"] = "none"
    """Name of the choice."""
    project: str = "llm-finetuning-runner"
    """Project in Weights & Biases."""
    entity: str | None = None
    """Team or user in Weights & Biases."""


class TrainSpec(Part):
    """How to optimise."""

    batch_size: int = Field(default=16, ge=1)
    """Global batch in sequences: the same on any hardware. With packing a sequence is `max_length` tokens of packed rows."""
    micro_batch_size: int | Auto = Field(default="auto")
    """Sequences that one process takes at once; auto derives it from `batch_size` and the hardware."""
    accumulation_steps: int | Auto = Field(default="auto")
    """Micro batches per optimiser step; auto derives it so that the product comes nearest to `batch_size`."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens per sequence; longer rows are cut, and the count is reported."""
    packing: bool = True
    """Put several short rows into one sequence (best-fit decreasing), without attention across them."""
    num_epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; overrides `num_epochs`."""
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up; wsd is warm-up, stable, decay (the last 20% of the steps)."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradient clipping by global norm; 0 switches it off."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw", "adafactor", "sgd"] = "adamw"
    """Optimiser; adamw is torch's fused kernel, the 8-bit and paged ones are bitsandbytes' and need a GPU."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic; auto takes bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention kernel; auto takes FlashAttention where it is installed and the GPU can, else SDPA."""
    gradient_checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass: less memory, a third more time; auto means on a GPU only."""
    liger: bool | Auto = "auto"
    """Liger's fused kernels; auto means on a GPU where `liger-kernel` is installed."""
    seed: int = Field(default=42, ge=0)
    """Seed of everything: data order, adapter initialisation, dropout."""
    save_every_steps: int | None = Field(default=None, ge=1)
    """Write a checkpoint every n steps; null means only when interrupted."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints to keep."""

    @field_validator("micro_batch_size", "accumulation_steps")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be a whole number of at least 1, or auto")
        return value


class EvalSpec(Part):
    """What is measured on held-out data."""

    num_prompts: int = Field(default=40, ge=0)
    """Held-out prompts answered before and after training and compared exactly; 0 switches it off."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts answered at once."""
    every_steps: int | None = Field(default=None, ge=1)
    """Measure the held-out loss every n steps as well; null means before and after only."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after n such measurements without a new best; needs `every_steps`."""


class RunInfo(Part):
    """Name and place of the run."""

    name: str | None = None
    """Name to recognise the run by; it begins the run's id. Null means model and method."""
    output_dir: str = "runs"
    """Folder in which every run gets its own directory."""
    metric: str = "eval.after.loss"
    """Key of `summary.json` that a sweep is sorted by and an HPO sweeper is given."""
    metric_mode: Literal["min", "max"] = "min"
    """Whether less or more of the metric is better."""

    @field_validator("name")
    @classmethod
    def _name_fits_a_folder(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(
                "a name is made of letters, digits, dots, dashes and underscores, beginning with a letter or digit; "
                f"write run.name={re.sub(r'[^A-Za-z0-9._-]+', '-', value).lstrip('._-') or 'NAME'}"
            )
        return value


class RunSpec(Part):
    """One run, complete: the file `spec.json` in the run directory."""

    model: ModelSpec
    method: Method
    hw: HardwareSpec
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    objective: Objective = Sft()
    data: DataSpec
    where: Where = LocalPlace()
    track: TrackSpec = TrackSpec()
    train: TrainSpec = TrainSpec()
    eval: EvalSpec = EvalSpec()
    run: RunInfo = RunInfo()

    @model_validator(mode="after")
    def _parts_agree(self) -> RunSpec:
        """Rules across parts: everything that can be refused without touching a GPU."""
        problems: list[str] = []
        limit = self.model.context_length
        if limit and self.train.max_length > limit:
            problems.append(
                f"train.max_length={self.train.max_length} is beyond {self.model.name}'s limit of {limit} "
                f"tokens; write train.max_length={limit} or less"
            )
        if self.eval.early_stopping_patience and not self.eval.every_steps:
            problems.append("eval.early_stopping_patience needs measurements; add eval.every_steps=50, say")
        layers = getattr(self.method, "layers", None)
        if layers is not None and self.model.num_layers:
            try:
                parse_layers(layers).select(self.model.num_layers)
            except ValueError as error:
                problems.append(f"method.layers={layers}: {error}")
        on_cpu = self.hw.accelerator == "cpu"
        if on_cpu and ("8bit" in self.train.optimizer or "paged" in self.train.optimizer):
            problems.append(f"train.optimizer={self.train.optimizer} needs a GPU; write train.optimizer=adamw")
        if self.train.precision == "bf16" and self.hw.bf16 is False and self.hw.accelerator == "cuda":
            problems.append(f"train.precision=bf16: {self.hw.name} has no bfloat16; write train.precision=fp16 or auto")
        if on_cpu and self.train.precision == "fp16":
            problems.append("train.precision=fp16 needs a GPU; write train.precision=bf16, fp32 or auto")
        if (
            self.train.attention.startswith("flash")
            and not self.hw.flash_attention
            and (self.hw.accelerator != "detect")
        ):
            problems.append(
                f"train.attention={self.train.attention} does not run on {self.hw.name}; write train.attention=sdpa"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
