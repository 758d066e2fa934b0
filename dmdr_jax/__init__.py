"""Distribution matching distillation with reinforcement learning (DMDR) in JAX."""

__version__ = "0.1.0"
