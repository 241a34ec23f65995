"""PEFT's adapter types beside those that the plan can count: their arguments, and why some of them cannot be used.

Names and defaults are those of PEFT 0.21.2; tests/spec/test_adapters.py holds both against the installed one.
"""

from __future__ import annotations

from typing import Any

UNCOUNTED: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 100, "num_subspaces": 5, "subspace_rank": 1, "init_weights": "orthogonal", "use_asa": False,
        "asa_target_subspaces": 50, "init_warmup": 50, "final_warmup": 1000, "mask_interval": 100,
        "asa_importance_beta": 0.85, "asa_uncertainty_beta": 0.85, "asa_schedule_exponent": 3.0,
        "use_dynamic_rank": False, "svd_threshold": 0.1, "random_seed": 0},
    "BEFT": {"init_weights": True},
    "BOFT": {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1, "boft_dropout": 0.0,
        "bias": "none", "init_weights": True},
    "C3A": {"block_size": 256, "bias": "none", "init_weights": "xavier_uniform"},
    "DEFT": {"r": 8, "decomposition_method": "relu", "init_scale": 1.0, "alpha": None, "para": False,
        "deft_dropout": 0.0, "init_weights": True, "bias": "none"},
    "DELORA": {"r": 8, "delora_lambda": 15, "module_dropout": 0.0, "bias": "none", "init_weights": True},
    "FOURIERFT": {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777, "bias": "none",
        "init_weights": False},
    "FROD": {"projection_prng_key": 0, "save_projection": True, "frod_dropout": 0.0, "bias": "none",
        "init_weights": True, "sparse_rate": 0.01, "regularization_alpha": 0.001, "progressbar": True,
        "runtime_offload_base_weight": False},
    "GLORA": {"r": 8, "bias": "none", "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant",
        "init_weights": True},
    "GRALORA": {"r": 32, "hybrid_r": 0, "alpha": 64, "gralora_dropout": 0.0, "gralora_k": 2, "bias": "none",
        "init_weights": True},
    "HIRA": {"r": 32, "hira_dropout": 0.0, "init_weights": True},
    "HRA": {"r": 8, "apply_GS": False, "init_weights": True, "bias": "none"},
    "LILY": {"r": 32, "stride_A": 1, "num_B": 2, "scaling": 1.0, "init_weights": True},
    "MISS": {"r": 64, "miss_dropout": 0.0, "mini_r": 1, "init_weights": True, "bias": "none"},
    "PEANUT": {"r": 32, "depth": 0, "act_fn": "relu", "scaling": 1.0, "init_weights": True},
    "PSOFT": {"r": 32, "psoft_alpha": 32, "psoft_dropout": 0.0, "ab_svd_init": "psoft_init", "psoft_svd": "full",
        "psoft_svd_lowrank_niter": 10, "random_seed": 0, "psoft_orth": True, "psoft_mag_b": True, "psoft_mag_a": True,
        "use_cayley_neumann": False, "num_cayley_neumann_terms": 5, "cayley_neumann_eps": None, "init_weights": True},
    "PVERA": {"r": 256, "projection_prng_key": 0, "save_projection": True, "pvera_dropout": 0.0, "d_initial": 0.1,
        "bias": "none", "init_weights": True, "sample_at_inference": False, "generator_seed": None},
    "RANDLORA": {"r": 32, "projection_prng_key": 0, "save_projection": True, "sparse": False, "very_sparse": False,
        "randlora_dropout": 0.0, "randlora_alpha": 640, "bias": "none", "init_weights": True},
    "ROAD": {"variant": "road_1", "group_size": 64, "init_weights": True},
    "SHIRA": {"r": 32, "mask_type": "random", "random_seed": None, "init_weights": True},
    "SUPERTUNING": {"sparsity": 0.99, "select_top": True, "r": None, "lora_alpha": None, "lora_dropout": 0.0,
        "init_weights": True, "save_precomputed_indices": True},
    "TINYLORA": {"r": 2, "u": 64, "weight_tying": 0.0, "projection_seed": 42, "save_projection": True,
        "init_v_bound": 0.02, "tinylora_dropout": 0.0, "bias": "none", "init_weights": True},
    "UNILORA": {"r": 4, "proj_seed": 42, "theta_d_length": 256, "unilora_dropout": 0.0, "bias": "none",
        "init_theta_d_bound": 0.02, "init_weights": True, "save_indices": False},
    "VBLORA": {"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "save_only_topk_weights": False,
        "vblora_dropout": 0.0, "bias": "none", "init_vector_bank_bound": 0.02, "init_logits_std": 0.1},
    "WAVEFT": {"n_frequency": 2592, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True,
        "random_loc_seed": 777, "bias": "none", "proportional_parameters": False, "init_weights": True},
}  # fmt: skip
"""Types for linear layers that need `method.trainable`: arguments that may be set, with PEFT's defaults."""

ON_ALL_LAYERS = ("BEFT", "GLORA", "IA3", "ROAD", "SHIRA", "SUPERTUNING")
"""Types that PEFT cannot put on some layers only."""

_PROMPT = "learns a prompt, and no part of a linear layer"
UNUSABLE = {
    "LORA": "has methods of its own",
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "ADAPTION_PROMPT": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADALORA": "moves its rank between layers after each step, which the trainer does not do",
    "LN_TUNING": "trains norms, and no part of a linear layer",
    "OSF": "needs a rank for each matrix of the model",
    "POLY": "needs the number of a task with each row",
    "SHADOW": "trains a second model beside the first",
    "TRAINABLE_TOKENS": "trains rows of the embedding, and no part of a linear layer",
    "XLORA": "mixes adapters that are trained already",
}
"""Types that no `method=` can name, and why."""

_LEAST = {
    "oft_block_size": 0, "boft_block_size": 0, "num_cayley_neumann_terms": 2, "init_warmup": 0, "final_warmup": 0,
}  # fmt: skip
"""Smallest whole number of an argument, where it is neither 1 nor a default below 1."""


def out_of_bounds(key: str, value: Any, default: Any) -> str | None:
    """Error for a number that an argument cannot have, its remedy after a semicolon."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    name = f"method.arguments.{key}"
    if key.endswith("dropout"):
        inside = 0 <= value < 1
        return (
            None if inside else f"{name}={value}: expected at least 0 and less than 1; write {name}=0, or leave it out"
        )
    if key.endswith(("seed", "prng_key")):
        return None
    least = _LEAST.get(key, 0 if isinstance(default, float) else 1 if default is None else min(1, default))
    remedy = f"write {name}={default}, PEFT's default" if key in _LEAST else f"write {name}={least}, or more"
    return None if value >= least else f"{name}={value}: expected at least {least}; {remedy}"
