"""One of several processes that feed the same run: writes which rows its devices got.

python -m tests.data.feeding_process OUTPUT PROCESS PROCESSES PORT SETTINGS START STOP
"""

import json
import sys
from pathlib import Path


def main(output: str, process: str, processes: str, port: str, settings: str, *span: str) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // int(processes))
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
    assert len(jax.devices()) == 8

    from mlm_jax.data.pipeline import open_data
    from mlm_jax.data.placement import Feed
    from mlm_jax.door import load_config
    from mlm_jax.layout import Layout

    run = load_config("quickstart", json.loads(settings))
    data = open_data(run)
    read, row = [], data.train.stream.row
    data.train.stream.row = lambda i: (read.append(i), row(i))[1]  # what is read, and no more
    feed = Feed(data.train, Layout.from_config(run))
    start, stop = map(int, span)
    rows = []
    for k, batch in enumerate(feed.ahead(start, stop), start):
        total = jax.jit(lambda x: x.sum())(batch["tokens"])  # the array is one array everywhere
        for shard in batch["tokens"].addressable_shards:
            first = shard.index[0].start or 0
            rows += [(k, first + i, tokens) for i, tokens in enumerate(shard.data.tolist())]
        rows.append((k, "sum", int(total)))
    Path(output).write_text(json.dumps({"rows": rows, "read": sorted(read)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
