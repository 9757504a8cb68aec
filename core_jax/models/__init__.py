"""Every pretrained network, one folder a family, and the table that finds it."""

from core_jax.models.auto import load_config, load_model, save_model

__all__ = ["load_config", "load_model", "save_model"]
