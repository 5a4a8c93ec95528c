"""mlm_jax: large transformers in JAX, the layout as data. See README.md.

Names are imported when first used, so that `import mlm_jax` and the command line answer at once.
"""

import importlib
import importlib.metadata
from typing import Any

EXPORTS = {
    "load_config": "mlm_jax.door",
    "RunConfig": "mlm_jax.config",
    "Layout": "mlm_jax.layout",
    "build": "mlm_jax.models",
    "load": "mlm_jax.checkpoint.workdir",
    "from_hf": "mlm_jax.checkpoint.hf",
    "to_hf": "mlm_jax.checkpoint.hf_export",
    "generate": "mlm_jax.inference.engine",
    "train": "mlm_jax.loop",
    "MlmJaxError": "mlm_jax.errors",
}
__all__ = [*EXPORTS]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("mlm_jax")
    if name not in EXPORTS:
        raise AttributeError(
            f"module 'mlm_jax' has no attribute {name!r}; it has {', '.join(EXPORTS)}"
        )
    return getattr(importlib.import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
