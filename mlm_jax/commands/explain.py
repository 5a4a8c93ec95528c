"""mlm-jax explain"""

import math

from mlm_jax.commands import add_config, command_parser, parse, print_table
from mlm_jax.door import load_config


def main(argv: list[str]) -> int:
    """mlm-jax explain --config SPEC [--devices N] [--config.KEY=VALUE ...]

    What a layout does with each weight: shape, names of its dims, rule that fired, spec, bytes on a
    device. The devices are only imagined: 512 GPUs are explained on a laptop.
    """
    parser = command_parser("explain", main.__doc__)
    add_config(parser)
    parser.add_argument("--devices", type=int, help="default: the product of the sizes set")
    args, overrides = parse(parser, argv)
    run = load_config(args.config, overrides)

    from mlm_jax.errors import ConfigError, LayoutError
    from mlm_jax.layout import MESH_AXES, Layout, bytes_held
    from mlm_jax.step import abstract_state

    sizes = [getattr(run.layout, axis) or 1 for axis in MESH_AXES]
    devices = math.prod(n for n in sizes if n > 0) if args.devices is None else args.devices
    if devices < 1:
        raise ConfigError(f"--devices {devices} must be at least 1")
    try:
        layout = Layout.from_config(run, devices)
    except LayoutError as why:
        if args.devices is None and "devices" in str(why):
            raise LayoutError(f"{why}\nor imagine more devices: --devices N") from None
        raise
    state = abstract_state(run, layout)
    rows = layout.explain(state.params)
    table = [("weight", "shape", "dims", "rule", "spec", "bytes/device")] + [
        (r["weight"], "x".join(map(str, r["shape"])), " ".join(r["dims"]), r["rule"],
         str(r["spec"]).removeprefix("P"), f"{r['bytes']:,}")
        for r in rows
    ]  # fmt: skip
    print_table(table)
    count = sum(math.prod(r["shape"]) for r in rows)
    held = sum(r["bytes"] for r in rows)
    mesh = " ".join(f"{axis}={n}" for axis, n in layout.mesh.shape.items())
    mesh += "" if args.devices or devices > 1 else " (one device; --devices N imagines more)"
    print(f"\n{count:,} parameters; mesh {mesh}")
    moments = bytes_held(state.opt_state)
    print(
        f"{held / 2**30:.3f} GiB of weights on a device, {(held + moments) / 2**30:.3f} with the"
        f" state of {run.optimizer.name}"
    )
    return 0
