"""What mlm_jax raises when a request cannot be carried out: exit status 2 on the command line."""


class MlmJaxError(Exception):
    """Base of all: the message is for a person, complete, and names what would work."""


class ConfigError(MlmJaxError):
    """A setting, or a combination of settings, that cannot be carried out."""


class LayoutError(MlmJaxError):
    """A layout that does not fit the model, the batch or the devices."""


class DataError(MlmJaxError):
    """Data that is missing, damaged, empty, or does not fit the model."""


class CheckpointError(MlmJaxError):
    """A workdir or checkpoint that is missing, damaged, or belongs to another run."""
