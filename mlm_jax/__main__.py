"""mlm-jax COMMAND ...: the command line.

Exit status: 0 done; 1 a failure while running; 2 the request cannot be carried out;
75 stopped on request after saving: start me again.
"""

import difflib
import importlib
import importlib.metadata
import logging
import sys
import time

from mlm_jax.distributed import lead, place_in_environment
from mlm_jax.errors import ConfigError, MlmJaxError

COMMANDS = {
    "train": "train a model, or resume; the folder of a run is all it needs",
    "generate": "continue prompts with a trained model",
    "explain": "table of a layout: weight, shape, dims, rule, spec, bytes per device",
    "data": "build and inspect token files",
    "convert": "models of Hugging Face and Megatron-LM into a workdir, and out of one",
    "checkpoint": "list, verify and compare what runs have saved",
}


HEARD = 3.0  # seconds in which whoever started the processes ends those of a failed one


def main(argv: list[str] | None = None) -> int:
    """Runs one command. argv: without the program's name; None: sys.argv."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("mlm_jax").setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a failed save is told once, by us
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mlm-jax {importlib.metadata.version('mlm_jax')}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise ConfigError(f"{argv[0]!r} is no command; {hint}")
        return importlib.import_module(f"mlm_jax.commands.{argv[0]}").main(argv[1:])
    except MlmJaxError as error:
        tell(error)
        return 1 if type(error) is MlmJaxError else 2
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stdout = None
        return 1
    except KeyboardInterrupt:
        return 130


def tell(error: MlmJaxError) -> None:
    """Of several processes, that were all asked the same, the first; others if they outlive it.

    Here come errors from before the processes of a run have met, or after they have parted.
    """
    who = ""
    if not lead():
        place = place_in_environment()
        who = f"[process {place.index} of {place.count}] "
        time.sleep(HEARD)
    print(f"{who}mlm-jax: {error}", file=sys.stderr)


def usage() -> str:
    rows = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    return (
        "usage: mlm-jax COMMAND ...\n\n"
        f"{rows}\n\n"
        "mlm-jax COMMAND --help tells more; `bash launch/quickstart.sh` shows it at work."
    )


if __name__ == "__main__":
    sys.exit(main())
