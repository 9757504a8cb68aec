"""Parameter declarations. Modules hold names and shapes and call `core_jax.ops`.

The compute type is the type of the parameters that are passed in: cast the tree, not the module.
"""
